# SPDX-License-Identifier: Apache-2.0
"""docs/examples/lightning."""

from __future__ import annotations

import re

import torch


def test_trains_and_reloads(example):
    output = example.run("\n".join(example.blocks))
    dice, difference = re.search(r"dice (\S+); reloaded, it differs by (\S+)", output).groups()
    assert 0 <= float(dice) <= 1 and float(difference) == 0
    stored = torch.load(example.folder / "out/model.ckpt", weights_only=True)
    assert stored["epoch"] == 2 and stored["hyper_parameters"]["num_maps"] == 2
    assert "network.rcu.map_weight" in stored["state_dict"]

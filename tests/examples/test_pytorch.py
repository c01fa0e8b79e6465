# SPDX-License-Identifier: Apache-2.0
"""docs/examples/pytorch."""

from __future__ import annotations

import re

import torch


def test_trains_and_goes_on(example):
    output = example.run("\n".join(example.blocks))
    losses = [float(value) for value in re.findall(r"loss (\S+)", output)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert "goes on after 1 epochs" in output
    stored = torch.load(example.folder / "checkpoint.pt", weights_only=True)
    assert stored["epochs"] == 2 and {"gcu1.skip_gate.squeeze.weight", "rcu.map_weight"} < set(
        stored["model"]
    )
    assert not list(example.folder.glob("*.tmp"))

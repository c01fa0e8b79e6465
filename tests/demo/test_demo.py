# SPDX-License-Identifier: Apache-2.0
"""The demo with a tiny budget: every stage runs, and what it says is what it measured."""

from __future__ import annotations

import json

import nibabel as nib
import pytest

from grcsf_kernels.demo import Budget, run_demo
from grcsf_kernels.engine import InputError

TINY = Budget(healthy=2, training=2, held_out=2, pretraining_steps=4, training_steps=4)


def test_every_stage_runs_and_is_reported(tmp_path, capsys):
    output = tmp_path / "demo"
    result = run_demo(output, spacing=6.0, budget=TINY)
    assert json.loads((output / "demo.json").read_text()) == result
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["networks"]) == {"grcsf", "backbone", "untrained"}
    assert result["networks"]["grcsf"]["parameters"] > result["networks"]["backbone"]["parameters"]
    for network in result["networks"].values():
        assert len(network["cases"]) == 2 and 0 <= network["mean"]["dice"] <= 1
    stages = result["stages"]
    assert len(stages) == 9 and all(stage["seconds"] > 0 for stage in stages)
    assert all(stage["peak_mib"] > 50 for stage in stages)
    saved = result["saved"]
    assert saved["times"] == pytest.approx(saved["reference_seconds"] / saved["seconds"])
    masks = sorted((output / "predictions/grcsf").glob("*_mask.nii.gz"))
    assert len(masks) == 2
    image = nib.load(output / "held_out/subject000_image.nii.gz")
    assert nib.load(masks[0]).shape == image.shape
    printed = " ".join(capsys.readouterr().out.split())
    for word in (
        "synthetic",
        "Dice",
        "lesion F1",
        "plain backbone",
        "untrained",
        "residual_map",
        "kernels save",
    ):
        assert word in printed

    # An earlier demo is replaced; anything else is not touched.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not of an earlier demo"):
        run_demo(tmp_path / "other", spacing=6.0, budget=TINY)
    assert (tmp_path / "other/thesis.txt").read_text() == "mine"

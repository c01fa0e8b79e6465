# SPDX-License-Identifier: Apache-2.0
"""The study: arms that differ in the network alone, areas, differences, a tiny one to its end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel", reason="needs the extra train")
pytest.importorskip("nilearn", reason="needs the extra demo")

from benchmarks.study import (
    causes,
    comparison,
    context,
    costs,
    making,
    pictures,
    protocol,
    ranking,
    report,
    runs,
)
from benchmarks.study.pool import run_all
from benchmarks.study.protocol import ARMS, Scale
from benchmarks.study.scales import SCALES
from grcsf_kernels import engine
from grcsf_kernels.models import MaskedAutoencoder, autoencoder
from grcsf_kernels.nn import RCU

TINY = Scale(
    name="tiny",
    spacing=8.0,
    training=2,
    held_out=2,
    channels=(4, 8),
    widened=(5, 9),
    crop=8,
    batch=1,
    steps=2,
    learning_rate=1e-3,
    rcu_levels=(0,),
    rcu_patch=4,
    reduction=2,
    autoencoder=engine.AutoencoderConfig(
        mask_ratios=protocol.MASK_RATIOS,
        patch_size=(8, 8, 8),
        embed_dim=12,
        depth=1,
        num_heads=1,
        decoder_dim=12,
        decoder_depth=1,
        decoder_heads=1,
    ),
    autoencoder_crop=(16, 16, 16),
    autoencoder_steps=2,
)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_arms_differ_in_the_network_alone(scale: Scale) -> None:
    configs = [protocol.training(scale, arm, 1) for arm in ARMS.values()]
    same = [dataclasses.replace(config, model=engine.ModelConfig()) for config in configs]
    assert all(config == same[0] for config in same)
    models = [json.dumps(dataclasses.asdict(config.model)) for config in configs]
    # both and both-complementary are the same network: their maps differ.
    assert len(set(models)) == len(ARMS) - 1


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_widened_backbone_has_the_parameters_of_the_full_model(scale: Scale) -> None:
    from grcsf_kernels.engine.training.train import build

    full, widened = (
        sum(
            weight.numel()
            for weight in build(protocol.training(scale, ARMS[arm], 0), 2).parameters()
        )
        for arm in ("both", "widened")
    )
    assert full <= widened < 1.25 * full


def test_areas_by_lesion_size() -> None:
    label = np.zeros((12, 12, 12), bool)
    label[2, 2, 2] = True  # 8 mm^3
    label[6:10, 6:10, 6:10] = True  # 512 mm^3
    inside = np.ones_like(label)
    inside[0] = False
    score = np.zeros(label.shape)
    score[6:10, 6:10, 6:10] = 1  # above every healthy voxel
    score[0] = 5  # air does not count
    areas = ranking.areas_under_curve(score, label, inside, 8.0)
    assert areas["100 to 1000"] == 1
    assert areas["0 to 100"] == 0.5  # as the healthy ones
    assert areas["all"] == pytest.approx((64 * 1 + 1 * 0.5) / 65)
    assert "1000 and more" not in areas
    summary = ranking.summarize([areas, {"all": 0.5}])
    assert list(summary) == ["all", "0 to 100", "100 to 1000"]
    assert summary["all"]["subjects"] == 2
    assert summary["0 to 100"]["interval"] is None


def _run(arm: str, seed: int, scores: list[float]) -> dict[str, Any]:
    cases = {
        f"s{index}": {
            "dice": score,
            "lesion_f1": score / 2,
            "sensitivity": score,
            "precision": score,
            "volume_difference": -2000.0,
        }
        for index, score in enumerate(scores)
    }
    lesions = {name: [[50.0, index == 0], [2000.0, True]] for index, name in enumerate(cases)}
    return {
        "arm": arm,
        "seed": seed,
        "cases": cases,
        "lesions": lesions,
        "parameters": 7,
        "training_seconds": 1.0,
        "prediction_seconds": 1.0,
        "resident_mib": 1.0,
    }


def test_differences_are_paired_and_clear_only_if_every_seed_agrees() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 0.8, 12)
    found: comparison.Runs = {
        "backbone": {seed: _run("backbone", seed, list(base)) for seed in (0, 1)},
        "gcu": {seed: _run("gcu", seed, list(base + 0.05)) for seed in (0, 1)},
        "rcu": {
            0: _run("rcu", 0, list(base + 0.2)),
            1: _run("rcu", 1, list(base - 0.02)),
        },
    }
    compared = comparison.differences(found)
    gcu, rcu = compared["gcu - backbone"]["dice"], compared["rcu - backbone"]["dice"]
    assert gcu["mean"] == pytest.approx(0.05)
    np.testing.assert_allclose(gcu["interval"], 0.05)  # pairs: subjects differ by far more
    assert gcu["clear"]
    assert rcu["interval"][0] > 0
    assert rcu["seeds"][1] < 0
    assert not rcu["clear"]
    assert not compared["gcu - backbone"]["absolute_volume_difference"]["clear"]
    described = comparison.describe(found)["gcu"]
    assert described["absolute_volume_difference"]["mean"] == 2
    assert described["found"]["0 to 100"]["mean"] == pytest.approx(1 / 12)
    assert described["found"]["1000 and more"]["lesions"] == 24


def test_a_tiny_study_to_its_end_and_again(tmp_path: Path) -> None:
    study = runs.Study(TINY, tmp_path / "work", tmp_path / "out")
    for name in runs.SETS:
        runs.make_subjects(study, name)
    runs.make_maps(study, 0)
    runs.rate_difficulty(study)
    for arm in ("backbone", "both-complementary"):
        runs.run_arm(study, arm, 0)
        costs.measure_costs(study, arm)
    report.write(study)
    text = (study.out / "report.md").read_text()
    for heading in ("## Arms", "## Differences", "## Residual maps", "## Costs"):
        assert heading in text
    assert "both-complementary less backbone" in text
    assert "75% hidden, complementary" in text
    for name in ("differences.png", "sizes.png", "ranking.png"):
        assert (study.out / name).stat().st_size > 1000
    pictures.draw_cases(study, "both-complementary", 0, tmp_path / "cases.png")
    assert (tmp_path / "cases.png").is_file()

    # Again: what is there stays as it is; a result with other settings is made anew.
    kept, other = (study.run_path(arm, 0) for arm in ("backbone", "both-complementary"))
    before = kept.read_bytes()
    changed = json.loads(other.read_text())
    changed["identity"]["spacing"] = 99
    other.write_text(json.dumps(changed))
    for arm in ("backbone", "both-complementary"):
        runs.run_arm(study, arm, 0)
    assert kept.read_bytes() == before
    assert json.loads(other.read_text())["identity"]["spacing"] == TINY.spacing


def test_a_piece_that_fails_is_named_and_stops_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = runs.Study(TINY, tmp_path / "work", tmp_path / "out")
    failed = run_all(
        [(runs.run_arm, (study, "rcu", 3)), (runs.make_subjects, (study, "training"))], 1
    )
    (line,) = failed
    assert line.startswith("run_arm rcu 3: ")
    assert (study.work / "training" / "done.json").is_file()
    assert "make_subjects training" in capfd.readouterr().out


def test_subjects_are_drawn(tmp_path: Path) -> None:
    pictures.draw_subjects(tmp_path / "subjects.png", 8.0, count=2)
    assert (tmp_path / "subjects.png").stat().st_size > 10_000


def test_trials_of_causes(tmp_path: Path) -> None:
    import nibabel as nib

    study = runs.Study(
        dataclasses.replace(TINY, development=2), tmp_path / "work", tmp_path / "out"
    )
    for name in ("development", "development_held_out", "development_healthy"):
        runs.make_subjects(study, name)
    causes.prepare_maps(study)
    initial = autoencoder._Attention.reset_parameters
    trials = ("as in the study", "16 draws", "healthy subjects", "patches half as long")
    for name in (*trials, "all three and half the decoder, as at first"):
        making.try_maps(study, name)
    assert autoencoder._Attention.reset_parameters is initial
    causes.try_information(study)
    before = RCU.reset_parameters
    for kind, name in (
        ("attention", "zero output"),
        ("network", "default"),
        ("network", "no maps"),
        ("network", "maps as channels of the image"),
    ):
        causes.try_network(study, kind, name, 0)
    assert RCU.reset_parameters is before
    parts = causes.tables(study.out)
    maps, errors, information, attention, network = parts[1::2]
    assert "| neighborhood and maps |" in information
    assert "| wide neighborhood |" in information
    assert maps.count("50% hidden, random") == 2
    assert maps.count("50% hidden, complementary") == 5
    assert errors.count("50%") == errors.count("75%") == 5
    assert maps.count("darkness") == 1
    assert "| zero output |" in attention
    assert "| default |" in network
    assert "| no maps |" in network
    assert "| maps as channels of the image |" in network

    # The maps of the attention trials are the lesions themselves.
    folder = study.work / "causes" / "lesions" / "development"
    found = np.asarray(nib.load(folder / "subject001_residual.nii.gz").dataobj)
    label = np.asarray(nib.load(study.work / "development" / "subject001_label.nii.gz").dataobj)
    np.testing.assert_array_equal(found, np.repeat(label[..., None], 2, axis=-1))


def test_errors_tell_whether_an_autoencoder_looks_at_the_image(tmp_path: Path) -> None:
    study = runs.Study(dataclasses.replace(TINY, held_out=3), tmp_path, tmp_path)
    runs.make_subjects(study, "held_out")
    network = MaskedAutoencoder(
        8, embed_dim=12, depth=1, num_heads=1, decoder_dim=12, decoder_heads=1, mask_ratio=0.5
    )

    def errors(name: str) -> dict[str, float]:
        path = network.save_pretrained(
            tmp_path / f"{name}.safetensors", preprocessing=protocol.DATA, crop_size=(16, 16, 16)
        )
        return context.context_errors(study.work / "held_out", [path])["50%"]

    looking = errors("looking")
    assert looking["own"] != looking["other"]
    with torch.no_grad():
        for weight in network.bridge.parameters():
            weight.zero_()
    blind = errors("blind")
    assert blind["own"] == pytest.approx(blind["other"], rel=0.2)  # whose voxels are air differs
    with torch.no_grad():
        for weight in network.predict.parameters():
            weight.zero_()
    nothing = errors("nothing")
    assert nothing["own"] == nothing["other"] == pytest.approx(1, rel=0.2)


def test_initializations_are_what_they_are_called() -> None:
    with making.replaced(RCU, "reset_parameters", causes.INITS["zero output"]):
        unit = RCU(4, patch_size=2)
    x = torch.randn(1, 4, 4, 4, 4)
    torch.testing.assert_close(unit(x, torch.rand(1, 2, 4, 4, 4)), x)
    fresh, spoilt = RCU(4, patch_size=2), RCU(4, patch_size=2)
    with torch.no_grad():
        for weight in spoilt.parameters():
            weight.zero_()
    for unit in (fresh, spoilt):
        torch.manual_seed(7)
        unit.reset_parameters()
    for one, other in zip(fresh.parameters(), spoilt.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0

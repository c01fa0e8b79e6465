# SPDX-License-Identifier: Apache-2.0
"""Pretrain, residual maps, train, predict and evaluate, and what a stopped run comes back to."""

from __future__ import annotations

import importlib
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from engine.conftest import (
    AFFINE,
    blob,
    optimization,
    pretrain_config,
    residuals_config,
    train_config,
    write,
)
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training import trainer as loop


def test_the_whole_way(folder, tmp_path):
    """Every stage runs on the files of the one before, and geometry is kept to the bit."""
    autoencoders = engine.pretrain(folder, tmp_path / "mae", pretrain_config())
    assert [path.name for path in autoencoders] == ["mae_50.safetensors", "mae_75.safetensors"]
    report = engine.cache_residuals(folder, autoencoders, tmp_path / "maps", residuals_config())
    assert len(report.done) == 3 and not report.failed
    maps = nib.load(report.done[0])
    assert maps.shape == (21, 18, 13, 2)
    values = maps.get_fdata()
    assert values.min() >= 0 and values.max() == pytest.approx(1, abs=1e-5)
    assert values.std() > 0.01

    model = engine.train(folder, tmp_path / "run", train_config(), tmp_path / "maps")
    config = engine.PredictConfig(device="cpu", probabilities=True, residuals=residuals_config())
    report = engine.predict(folder, model, tmp_path / "masks", config, autoencoders)
    assert len(report.done) == 3 and not report.failed
    image = nib.load(folder / "case0_image.nii.gz")
    mask = nib.load(tmp_path / "masks/case0_mask.nii.gz")
    assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.affine, image.affine)
    for name in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        assert np.array_equal(mask.header[name], image.header[name]), name
    probability = nib.load(tmp_path / "masks/case0_probability.nii.gz").get_fdata()
    assert np.array_equal(probability >= 0.5, mask.get_fdata() > 0)

    result = engine.evaluate(tmp_path / "masks", folder)
    assert set(result["cases"]) == {"case0", "case1", "case2"}
    stored = json.loads((tmp_path / "masks/evaluation.json").read_text())
    assert stored == result
    assert not [p for p in tmp_path.rglob("*.tmp*")]


def test_cached_maps_and_maps_on_the_way_give_the_same_mask(folder, tmp_path):
    autoencoders = engine.pretrain(folder, tmp_path / "mae", pretrain_config())
    engine.cache_residuals(folder, autoencoders, tmp_path / "maps", residuals_config())
    model = engine.train(folder, tmp_path / "run", train_config(), tmp_path / "maps")
    config = engine.PredictConfig(device="cpu", probabilities=True, residuals=residuals_config())
    engine.predict(folder, model, tmp_path / "one", config, autoencoders)
    engine.predict(folder, model, tmp_path / "two", config, residuals=tmp_path / "maps")
    one, two = (
        nib.load(tmp_path / n / "case1_probability.nii.gz").get_fdata() for n in ("one", "two")
    )
    assert np.abs(one - two).max() < 1e-5


def test_the_backbone_needs_no_maps(folder, tmp_path):
    config = train_config(use_rcu=False, use_gcu=False)
    model = engine.train(folder, tmp_path / "run", config)
    report = engine.predict(
        folder / "case0_image.nii.gz", model, tmp_path / "m", engine.PredictConfig(device="cpu")
    )
    assert [path.name for path in report.done] == ["case0_mask.nii.gz"]


def test_training_learns(folder, tmp_path):
    """The blobs' lesions are bright: a few steps find them, a network that learns nothing won't."""
    config = train_config(use_rcu=False, epochs=4, steps_per_epoch=40, learning_rate=5e-3)
    config.crop_size = (24, 24, 16)
    model = engine.train(folder, tmp_path / "run", config)
    engine.predict(folder, model, tmp_path / "m", engine.PredictConfig(device="cpu"))
    assert engine.evaluate(tmp_path / "m", folder)["mean"]["dice"] > 0.8


def test_spacing_is_undone(folder, tmp_path):
    """Trained at another spacing and orientation, the mask lies on the lesion all the same."""
    config = train_config(use_rcu=False, epochs=3, steps_per_epoch=40, learning_rate=5e-3)
    config.data.spacing = (1.2, 1.2, 1.2)
    config.crop_size = (16, 16, 16)
    model = engine.train(folder, tmp_path / "run", config)
    engine.predict(folder, model, tmp_path / "m", engine.PredictConfig(device="cpu"))
    mask = nib.load(tmp_path / "m/case0_mask.nii.gz")
    label = nib.load(folder / "case0_label.nii.gz")
    assert mask.shape == label.shape and np.array_equal(mask.affine, label.affine)
    assert engine.evaluate(tmp_path / "m", folder)["mean"]["dice"] > 0.6


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [(1, 1), (2, 0)])
def test_a_killed_run_ends_with_the_same_bits(folder, tmp_path, monkeypatch, kill_at):
    """Stopped in the middle of an epoch and started again: equal weights, bit for bit."""
    config = train_config(use_rcu=False, epochs=3)
    whole = load_file(engine.train(folder, tmp_path / "whole", config))

    one_step = loop._one_step

    def killed(run, micros):
        if (micros[0].epoch, micros[0].step) == kill_at:
            raise Killed
        return one_step(run, micros)

    monkeypatch.setattr(loop, "_one_step", killed)
    with pytest.raises(Killed):
        engine.train(folder, tmp_path / "part", config)
    monkeypatch.undo()
    torch.manual_seed(1234)  # the state of the global generator must not matter
    resumed = load_file(engine.train(folder, tmp_path / "part", config))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_killed_pretraining_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    config = pretrain_config(epochs=3)
    whole = [load_file(path) for path in engine.pretrain(folder, tmp_path / "whole", config)]
    one_step = loop._one_step
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 9:  # in the second autoencoder
            raise Killed
        return one_step(*args)

    monkeypatch.setattr(loop, "_one_step", killed)
    with pytest.raises(Killed):
        engine.pretrain(folder, tmp_path / "part", config)
    monkeypatch.undo()
    resumed = [load_file(path) for path in engine.pretrain(folder, tmp_path / "part", config)]
    for one, two in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(whole[0]["embed.weight"], whole[1]["embed.weight"])


def test_a_finished_run_is_not_trained_again(folder, tmp_path, monkeypatch):
    config = train_config(use_rcu=False)
    path = engine.train(folder, tmp_path / "run", config)
    before = path.read_bytes()
    monkeypatch.setattr(loop, "_one_step", lambda *args: pytest.fail("a step was taken"))
    assert engine.train(folder, tmp_path / "run", config).read_bytes() == before


def test_validation_keeps_the_best_epoch(folder, tmp_path, monkeypatch):
    config = train_config(use_rcu=False, epochs=3)
    config.validation_fraction, config.validation_every = 0.34, 1
    scores = iter([0.2, 0.9, 0.5])
    kept = []
    train_module = importlib.import_module("grcsf_kernels.engine.training.train")
    monkeypatch.setattr(train_module, "_validate", lambda *args: next(scores))
    original = train_module.save_checkpoint
    monkeypatch.setattr(
        train_module, "save_checkpoint", lambda *args: kept.append(1) or original(*args)
    )
    engine.train(folder, tmp_path / "run", config)
    assert len(kept) == 2  # the first and the better second, not the third


def test_the_model_file_holds_its_configuration(folder, tmp_path):
    config = train_config(use_rcu=False)
    config.data.intensity = "window"
    loaded = load_checkpoint(engine.train(folder, tmp_path / "run", config), "GRCSF")
    assert loaded.data == config.data and loaded.crop_size == config.crop_size
    assert loaded.model.config["channels"] == [4, 8, 8]
    assert not loaded.model.training


def test_volumes_smaller_than_the_crop_are_padded(tmp_path):
    image, label = blob(0, (9, 18, 5))
    write(tmp_path / "d/a_image.nii.gz", image, AFFINE)
    write(tmp_path / "d/a_label.nii.gz", label, AFFINE)
    model = engine.train(tmp_path / "d", tmp_path / "run", train_config(use_rcu=False))
    report = engine.predict(
        tmp_path / "d", model, tmp_path / "m", engine.PredictConfig(device="cpu")
    )
    assert nib.load(report.done[0]).shape == (9, 18, 5)


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision(folder, tmp_path, precision):
    config = train_config()
    config.optimization.precision = precision
    autoencoders = engine.pretrain(folder, tmp_path / "mae", pretrain_config(precision=precision))
    engine.cache_residuals(folder, autoencoders, tmp_path / "maps", residuals_config())
    weights = load_file(engine.train(folder, tmp_path / "run", config, tmp_path / "maps"))
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights.values())


def test_learning_rate_warms_up_and_decays():
    config = optimization(epochs=10, steps_per_epoch=10, warmup_epochs=2.0, learning_rate=1.0)
    rates = [loop.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == 1.0
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[-1] < 1e-3

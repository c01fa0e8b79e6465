# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf never become a mask, a map, a score or an exported file."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from engine.conftest import (
    AFFINE,
    blob,
    cases,
    load,
    make_autoencoders,
    make_model,
    predict_config,
    residuals_config,
    train_config,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grcsf_kernels import engine
from grcsf_kernels.engine.inference.residuals import VolumeMaps
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.nn import RCU, ResidualMaps
from grcsf_kernels.nn.residual_maps import rescale

predict_module = sys.modules["grcsf_kernels.engine.inference.predict"]
EVERYTHING = {"probabilities": True, "uncertainty": True}


def broken_output(monkeypatch, cls, method, value, when):
    """Lets a network give ``value`` in one voxel where ``when(image)`` says so."""
    original = getattr(cls, method)

    def run(self, image, *args):
        found = original(self, image, *args)
        if when(self, image):
            found = found.clone()
            found.view(-1)[found.numel() // 2] = value
        return found

    monkeypatch.setattr(cls, method, run)


def bright(network, image):
    """The windows of the one case that is marked by its brightest voxel."""
    return bool((image > 20).any())


@pytest.fixture
def marked(tmp_path):
    """Three cases; one voxel of case1 is far above the others."""
    folder = cases(tmp_path / "data")
    image, _ = blob(1)
    image[10, 9, 6] = 1500
    write(folder / "case1_image.nii.gz", image)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("skip_air", [False, True])
def test_a_case_without_finite_probabilities_is_an_error_and_the_others_are_done(
    marked, tmp_path, model, monkeypatch, value, skip_air
):
    broken_output(monkeypatch, GRCSF, "forward", value, bright)
    out = tmp_path / "m"
    report = engine.predict(marked, model, out, predict_config(skip_air=skip_air, **EVERYTHING))
    assert [p.name for p in report.done] == ["case0_mask.nii.gz", "case2_mask.nii.gz"]
    ((path, reason),) = report.failed
    assert path.name == "case1_image.nii.gz"
    assert f"{model} gives values that are NaN or infinite on image from" in reason
    assert "all its weights are finite" in reason and "\n" not in reason
    assert not [p.name for p in out.iterdir() if "case1" in p.name]
    assert all(np.isfinite(load(path)).all() for path in out.iterdir())


@pytest.mark.parametrize("mirror_axes", [(), (0,)])
def test_one_member_of_an_ensemble_is_enough(marked, tmp_path, monkeypatch, mirror_axes):
    models = [make_model(tmp_path / f"{seed}.safetensors", seed) for seed in range(2)]
    second = load_file(models[1])

    def when(network, image):
        name, weights = next(iter(network.named_parameters()))
        return bright(network, image) and torch.equal(weights, second[name])

    broken_output(monkeypatch, GRCSF, "forward", float("nan"), when)
    report = engine.predict(marked, models, tmp_path / "m", predict_config(mirror_axes=mirror_axes))
    assert len(report.done) == 2
    assert str(models[1]) in report.failed[0][1] and str(models[0]) not in report.failed[0][1]


def test_a_weight_that_is_not_finite_is_named(tmp_path, monkeypatch):
    """Also where the file was sound and the network was not: the message looks at the weights."""
    folder, path = cases(tmp_path / "data"), make_model(tmp_path / "m.safetensors")
    original = predict_module.load_checkpoint

    def load_broken(*args):
        checkpoint = original(*args)
        with torch.no_grad():
            next(checkpoint.model.parameters()).view(-1)[0] = float("nan")
        return checkpoint

    monkeypatch.setattr(predict_module, "load_checkpoint", load_broken)
    report = engine.predict(folder, path, tmp_path / "out", predict_config())
    name, _ = next(load_checkpoint(path, "GRCSF").model.named_parameters())
    assert not report.done and len(report.failed) == 3
    assert f"its weight {name} is not finite; copy the model file again" in report.failed[0][1]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["model", "autoencoder"])
def test_a_model_file_with_nan_is_refused_before_any_case(tmp_path, kind):
    folder, paths = cases(tmp_path / "data"), make_autoencoders(tmp_path)
    model = make_model(tmp_path / "m.safetensors", use_rcu=True)
    path = model if kind == "model" else paths[1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["grcsf"])
    for name in ("format", "sha256"):  # as a file of an earlier version: without a checksum
        description.pop(name, None)
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"grcsf": json.dumps(description)})
    with pytest.raises(engine.InputError, match=rf"{path.name}: has weights that are NaN"):
        engine.predict(folder, model, tmp_path / "out", predict_config(), paths)
    assert not (tmp_path / "out").exists()


class TestMaps:
    @pytest.mark.parametrize("skip_air", [False, True])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_maps_that_are_not_finite_are_not_written(
        self, marked, tmp_path, monkeypatch, value, skip_air
    ):
        paths = make_autoencoders(tmp_path)
        broken_output(monkeypatch, MaskedAutoencoder, "reconstruct", value, bright)
        settings = residuals_config()
        settings.skip_air = skip_air
        report = engine.cache_residuals(marked, paths, tmp_path / "maps", settings)
        assert len(report.done) == 2
        reason = report.failed[0][1]
        assert "case1_image.nii.gz: " in reason and "gives values that are NaN" in reason
        assert not list((tmp_path / "maps").glob("*case1*"))
        model = make_model(tmp_path / "m.safetensors", use_rcu=True)
        report = engine.predict(marked, model, tmp_path / "out", predict_config(), paths)
        assert len(report.done) == 2 and "case1_image.nii.gz: " in report.failed[0][1]
        assert not list((tmp_path / "out").glob("*case1*"))

    def test_half_precision_does_not_clip_maps(self, marked, tmp_path, monkeypatch):
        """Maps are kept before they are rescaled: float16 ends at 65504."""
        paths = make_autoencoders(tmp_path)
        broken_output(monkeypatch, MaskedAutoencoder, "reconstruct", 1e6, bright)
        settings = residuals_config()
        engine.cache_residuals(marked, paths, tmp_path / "full", settings)
        assert load(tmp_path / "full/case1_residual.nii.gz").max() == 1
        settings.precision = "float16"
        report = engine.cache_residuals(marked, paths, tmp_path / "half", settings)
        assert len(report.done) == 2
        assert "set residuals.precision to float32" in report.failed[0][1]

    def test_the_module_does_not_hide_nan(self):
        maps = torch.rand(2, 2, 4, 4, 4)
        maps[1, 1, 0, 0, 0] = torch.nan
        found = rescale(maps)
        assert found[1, 1].isnan().any() and found[0].isfinite().all()
        maps[1, 1, 0, 0, 0] = torch.inf
        assert rescale(maps)[1, 1].isnan().any()
        autoencoder = MaskedAutoencoder(
            (4, 4, 4), embed_dim=12, depth=1, num_heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2,
        )  # fmt: skip
        with torch.no_grad():
            next(autoencoder.parameters()).fill_(torch.nan)
        module = ResidualMaps([autoencoder], (0.5,), draws=2, masking="complementary")
        assert module(torch.rand(1, 1, 8, 8, 8)).isnan().any()

    def test_volume_maps_have_the_same_right_values_with_air(self, tmp_path):
        """Voxels that no window covers are 0, and others what they are without ``skip_air``."""
        paths = make_autoencoders(tmp_path)
        image = torch.zeros(1, 16, 16, 40)
        image[..., :8] = torch.rand(1, 16, 16, 8) + 0.5
        settings = residuals_config()
        settings.skip_air = True
        found = VolumeMaps(paths, settings)(image, "a")
        assert (found[..., 16:] == 0).all() and found.max() == 1 and found.isfinite().all()


def test_a_patch_with_a_score_of_nan_is_not_left_out():
    unit = RCU(4, num_maps=1, patch_size=4).eval()
    unit.score_threshold = 0.5
    with torch.no_grad():
        unit.score_output.bias.fill_(torch.nan)
        found = unit(torch.randn(1, 4, 8, 8, 8), torch.rand(1, 1, 8, 8, 8))
    assert found.isnan().any()


def test_validation_refuses_logits_that_are_not_finite(tmp_path, monkeypatch):
    folder = cases(tmp_path / "data")
    config = train_config(use_rcu=False)
    config.validation_fraction = 0.34
    broken_output(
        monkeypatch, GRCSF, "forward", float("nan"), lambda network, _: not network.training
    )
    with pytest.raises(engine.InputError, match=r"case\d_image.nii.gz: .*NaN or infinite"):
        engine.train(folder, tmp_path / "run", config)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_probabilities_at_the_threshold_are_lesion(tmp_path, model, monkeypatch):
    path = write(tmp_path / "a.nii.gz", blob(0)[0], AFFINE)
    monkeypatch.setattr(GRCSF, "forward", lambda self, image, maps: torch.zeros_like(image))
    engine.predict(path, model, tmp_path / "m", predict_config(threshold=0.5))
    assert load(tmp_path / "m/a_mask.nii.gz").all()
    engine.predict(path, model, tmp_path / "m", predict_config(threshold=0.5000001))
    assert not load(tmp_path / "m/a_mask.nii.gz").any()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_threshold_is_between_0_and_1(tmp_path, model, threshold):
    path = write(tmp_path / "a.nii.gz", blob(0)[0], AFFINE)
    with pytest.raises(engine.InputError, match=r"^threshold: is"):
        engine.predict(path, model, tmp_path / "m", predict_config(threshold=threshold))


@pytest.mark.parametrize("least", [float("nan"), float("inf"), -1.0])
def test_a_smallest_lesion_is_a_number(tmp_path, model, least):
    path = write(tmp_path / "a.nii.gz", blob(0)[0], AFFINE)
    with pytest.raises(engine.InputError, match=r"^min_lesion_mm3: is"):
        engine.predict(path, model, tmp_path / "m", predict_config(min_lesion_mm3=least))

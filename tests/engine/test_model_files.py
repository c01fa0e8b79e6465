# SPDX-License-Identifier: Apache-2.0
"""Model files as modules, what made their residual maps, and files of earlier versions."""

from __future__ import annotations

import pytest
import torch
from engine.conftest import pretrain_config, residuals_config, rewrite, train_config

from grcsf_kernels import engine
from grcsf_kernels.engine import DataConfig, InputError
from grcsf_kernels.engine.data.samples import Preprocessing
from grcsf_kernels.engine.io.nifti import read_volume
from grcsf_kernels.engine.io.provenance import read_maps
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training.pretrain import autoencoder_path
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.models.inputs import compare_maps


def small(**options):
    return GRCSF(channels=(4, 8), patch_size=4, num_heads=2, head_dim=4, rcu_levels=(0,), **options)


def test_a_module_comes_back(tmp_path):
    data = DataConfig(spacing=(1.0, 1.0, 2.0))
    model = small(in_channels=2, num_maps=1)
    path = model.save_pretrained(
        tmp_path / "m.safetensors", preprocessing=data, crop_size=(8, 8, 8)
    )
    again = GRCSF.from_pretrained(str(path))
    image, maps = torch.randn(1, 2, 8, 8, 8), torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(again(image, maps), model.eval()(image, maps)) and not again.training
    assert again.preprocessing == data and again.crop_size == (8, 8, 8)
    # Written again it says the same, and grcsf predict can read it.
    assert load_checkpoint(again.save_pretrained(tmp_path / "n.safetensors"), "GRCSF").data == data


def test_a_module_of_ones_own_needs_no_preprocessing(tmp_path):
    class Mine(MaskedAutoencoder):
        pass

    model = Mine(4, spatial_dims=2, embed_dim=16, num_heads=2, decoder_dim=8, decoder_heads=2)
    path = model.save_pretrained(tmp_path / "m.safetensors")
    again = Mine.from_pretrained(path)
    assert isinstance(again, Mine) and again.preprocessing is None and again.spatial_dims == 2
    with pytest.raises(InputError, match=r"m.safetensors: has no preprocessing"):
        load_checkpoint(path, "MaskedAutoencoder")
    with pytest.raises(InputError, match=r"contains a MaskedAutoencoder model, expected a GRCSF"):
        GRCSF.from_pretrained(path)
    with pytest.raises(InputError, match="does not exist"):
        GRCSF.from_pretrained(tmp_path / "none.safetensors")


@pytest.fixture
def trained(folder, tmp_path):
    autoencoders = engine.pretrain(
        folder, tmp_path / "mae", pretrain_config(epochs=1, steps_per_epoch=1)
    )
    engine.cache_residuals(folder, autoencoders, tmp_path / "maps", residuals_config())
    config = train_config(epochs=1, steps_per_epoch=1)
    return autoencoders, engine.train(folder, tmp_path / "run", config, tmp_path / "maps")


def predict(folder, tmp_path, model, autoencoders=(), **options):
    config = engine.PredictConfig(device="cpu", residuals=residuals_config())
    image = folder / "case0_image.nii.gz"
    return engine.predict(image, model, tmp_path / "masks", config, autoencoders, **options)


def test_the_maps_a_model_was_trained_with(folder, tmp_path, trained, capsys):
    """Recorded beside the maps and in the model; other weights are said, other ratios refused."""
    autoencoders, path = trained
    model = GRCSF.from_pretrained(path)
    assert model.residual_maps == read_maps(tmp_path / "maps")
    ratios = [one["mask_ratio"] for one in model.residual_maps["autoencoders"]]
    assert ratios == [0.5, 0.75] and model.residual_maps["draws"] == 4
    digests = {one["weights"] for one in model.residual_maps["autoencoders"]}
    assert len(digests) == 2
    # A module of the trained network works on what the recorded preprocessing makes.
    image = Preprocessing(model.preprocessing).image(read_volume(folder / "case0_image.nii.gz"))
    assert image.shape == (1, 21, 18, 13)

    capsys.readouterr()
    predict(folder, tmp_path, path, autoencoders)
    predict(folder, tmp_path, path, residuals=tmp_path / "maps")
    assert "weights" not in capsys.readouterr().err
    other = MaskedAutoencoder.from_pretrained(autoencoders[0])
    with torch.no_grad():
        other.mask_token += 1
    retrained = other.save_pretrained(tmp_path / "retrained.safetensors")
    assert len(predict(folder, tmp_path, path, [retrained, autoencoders[1]]).done) == 1
    assert "mask ratio 0.5 has other weights" in " ".join(capsys.readouterr().err.split())
    other.config["mask_ratio"] = 0.25
    wrong = other.save_pretrained(tmp_path / "wrong.safetensors")
    message = r"mask ratios \[0.25, 0.75\], .* trained with \[0.5, 0.75"
    with pytest.raises(InputError, match=message):
        predict(folder, tmp_path, path, [wrong, autoencoders[1]])


def test_files_of_earlier_versions(folder, tmp_path, trained):
    """Without what is recorded now: no maps, no newer settings."""
    autoencoders, path = trained

    def earlier(description):
        description.pop("maps")
        description["config"].pop("position_base", None)
        for name in ("channel_windows", "crop_foreground", "bids_suffixes"):
            description["data"].pop(name)

    for file in (path, *autoencoders):
        rewrite(file, earlier)
    (tmp_path / "maps/residuals.json").unlink()
    assert MaskedAutoencoder.from_pretrained(autoencoders[0]).position_base == 10000
    assert len(predict(folder, tmp_path, path, autoencoders).done) == 1
    assert len(predict(folder, tmp_path, path, residuals=tmp_path / "maps").done) == 1
    loaded = load_checkpoint(path, "GRCSF")
    assert loaded.maps is None and loaded.data == DataConfig()


def test_settings_of_the_maps_are_compared():
    def maps(**changes):
        one = {"mask_ratio": 0.5, "weights": "a"}
        return {"autoencoders": [one], "draws": 4, "masking": "random", "overlap": 0.5} | changes

    assert compare_maps(maps(), maps(), "x") == compare_maps(None, maps(), "x") == []
    (remark,) = compare_maps(maps(), maps(draws=1), "x")
    assert "x: residual maps with draws 1, and the model was trained with 4" in remark


def test_ratios_that_round_alike_have_files_of_their_own(folder, tmp_path):
    assert autoencoder_path(tmp_path, 0.55).name == "mae_55.safetensors"
    config = pretrain_config(epochs=1, steps_per_epoch=1)
    config.model.mask_ratios = (0.5, 0.504)
    paths = engine.pretrain(folder, tmp_path / "mae", config)
    assert [path.name for path in paths] == ["mae_50.safetensors", "mae_50.4.safetensors"]
    ratios = [MaskedAutoencoder.from_pretrained(path).mask_ratio for path in paths]
    assert ratios == [0.5, 0.504]
    assert (tmp_path / "mae/mae_50.4.state").is_file() and (tmp_path / "mae/mae_50.state").is_file()
    config.model.mask_ratios = (0.5, 0.5)
    with pytest.raises(InputError, match=r"model.mask_ratios: is .* expected ratios that differ"):
        engine.pretrain(folder, tmp_path / "mae", config)

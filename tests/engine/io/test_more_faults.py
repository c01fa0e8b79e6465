# SPDX-License-Identifier: Apache-2.0
"""Faults that are found late: geometry, checksums, settings out of range, memory, file modes."""

from __future__ import annotations

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from engine.conftest import (
    blob,
    pretrain_config,
    residuals_config,
    train_config,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grcsf_kernels import engine
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.data.preprocessing import Preprocessing
from grcsf_kernels.engine.devices import make_fabric
from grcsf_kernels.engine.inference.residuals import VolumeMaps
from grcsf_kernels.engine.io.nifti import read_volume
from grcsf_kernels.engine.model_files import load_checkpoint


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_affine_without_a_geometry_is_refused(folder, value):
    path = folder / "case1_image.nii.gz"
    image = nib.load(path)
    header = image.header.copy()
    for row in ("srow_x", "srow_y", "srow_z"):
        header[row] = value
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), path)
    with pytest.raises(InputError, match=r"case1_image.nii.gz: has an affine that is singular"):
        read_volume(path)


def test_a_flipped_bit_is_found_by_the_checksum(folder):
    path = folder / "case1_image.nii.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"case1_image.nii.gz: can't be read"):
        read_volume(path)


def test_complex_voxels_are_refused(folder):
    path = write(folder / "case1_image.nii.gz", blob(1)[0].astype(np.complex64))
    with pytest.raises(InputError, match="expected one number a voxel"):
        read_volume(path)


def test_a_path_with_brackets_is_reported(folder, tmp_path, capsys):
    odd = shutil.copytree(folder, tmp_path / "old[/red] [data]")
    (odd / "case1_label.nii.gz").unlink()
    report = engine.Report()
    engine.train(odd, tmp_path / "run", train_config(use_rcu=False, epochs=1), report=report)
    assert len(report.failed) == 1
    assert "old[/red] [data]" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 0}, "optimization.batch_size"),
        ({"epochs": 0}, "optimization.epochs"),
        ({"steps_per_epoch": 0}, "optimization.steps_per_epoch"),
        ({"learning_rate": -1.0}, "optimization.learning_rate"),
        ({"cache_gb": -1.0}, "optimization.cache_gb"),
    ],
)
def test_optimization_out_of_range(folder, tmp_path, change, name):
    with pytest.raises(InputError, match=f"^{name}: is"):
        engine.train(folder, tmp_path / "run", train_config(use_rcu=False, **change))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("", "crop_size", (0, 8, 8)),
        ("", "foreground", 1.5),
        ("", "validation_fraction", 1.0),
        ("", "validation_every", 0),
        ("data", "spacing", (1.0, -1.0, 1.0)),
        ("data", "window", (5.0, 5.0)),
        ("model", "patch_size", (0, 4, 4)),
        ("model", "channels", ()),
    ],
)
def test_settings_out_of_range(part, name, value):
    config = train_config()
    check(config)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(InputError, match=f"^{part + '.' if part else ''}{name}: is"):
        check(config)


def test_other_settings_out_of_range():
    for config in (engine.ResidualsConfig(overlap=1.0), engine.PredictConfig(overlap=-0.1)):
        with pytest.raises(InputError, match="overlap: is"):
            check(config)
    with pytest.raises(InputError, match="threshold: is"):
        check(engine.PredictConfig(threshold=1.0))
    for ratios in ((), (0.5, 1.0)):
        config = pretrain_config()
        config.model.mask_ratios = ratios
        with pytest.raises(InputError, match=r"model.mask_ratios: is"):
            check(config)


def test_half_precision_on_the_cpu_is_refused():
    with pytest.raises(InputError, match="16-mixed on the CPU"):
        make_fabric("cpu", "16-mixed")


def test_a_crop_of_one_patch_is_refused(folder, tmp_path):
    config = pretrain_config()
    config.model.patch_size = config.crop_size
    with pytest.raises(InputError, match="crop_size: is a single patch"):
        engine.pretrain(folder, tmp_path / "mae", config)


def test_masks_that_need_more_patches_than_a_crop_has(folder, tmp_path):
    config = pretrain_config(epochs=1)
    config.model.patch_size = (8, 16, 8)
    paths = engine.pretrain(folder, tmp_path / "mae", config)
    with pytest.raises(InputError, match="a crop has 2 patches, and the masks need 4"):
        engine.cache_residuals(folder, paths, tmp_path / "maps", residuals_config())


def test_one_file_is_no_training_set(folder, tmp_path):
    with pytest.raises(InputError, match=r"case0_image.nii.gz: is a file"):
        engine.train(folder / "case0_image.nii.gz", tmp_path / "run", train_config(use_rcu=False))


@pytest.mark.parametrize("missing", ["config", "data", "crop_size", None])
def test_a_damaged_description(folder, tmp_path, missing):
    model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
    with safe_open(model, "pt") as file:
        description = json.loads(file.metadata()["grcsf"])
    description.pop(missing, None)
    text = json.dumps(description) if missing else "{not json"
    save_file(load_file(model), model, metadata={"grcsf": text})
    with pytest.raises(InputError, match=r"model.safetensors: has"):
        load_checkpoint(model, "GRCSF")


def test_the_order_of_the_autoencoders_does_not_matter(folder, tmp_path):
    paths = engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1))
    one, two = (
        engine.cache_residuals(folder, order, tmp_path / name, residuals_config()).done[0]
        for name, order in (("one", paths), ("two", paths[::-1]))
    )
    one, two = nib.load(one).get_fdata(), nib.load(two).get_fdata()
    assert np.array_equal(one, two) and not np.array_equal(one[..., 0], one[..., 1])
    assert VolumeMaps(paths[::-1], residuals_config()).patch == (4, 4, 4)


def test_files_get_the_mode_that_the_user_wants(folder, tmp_path):
    before = os.umask(0o027)
    try:
        model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
    finally:
        os.umask(before)
    assert model.stat().st_mode & 0o777 == 0o640


def test_cases_that_memory_has_no_room_for_are_read_again(folder, tmp_path):
    """The memory for cases changes the speed, and no bit of the result."""
    configs = [train_config(use_rcu=False, cache_gb=size) for size in (8.0, 0.0, 3e-5)]
    for config in configs:
        config.validation_fraction, config.validation_every = 0.34, 1
    weights = [
        load_file(engine.train(folder, tmp_path / str(index), config))
        for index, config in enumerate(configs)
    ]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)


def test_a_window_begins_at_the_value_that_pads(folder):
    """Air is 0 after a window as after a z-score: crops and windows are padded with 0."""
    config = engine.DataConfig(intensity="window", window=(50.0, 120.0))
    volume = read_volume(folder / "case0_image.nii.gz")
    image = Preprocessing(config).image(volume)
    assert image.min() == 0 and image.max() == 1
    assert image[0, 0, 0, 0] == 0  # outside the ellipsoid


def test_labels_are_measured_without_their_images(folder, tmp_path):
    for index in range(3):
        write(tmp_path / f"masks/case{index}_mask.nii.gz", blob(index)[1])
    write(tmp_path / "masks/stranger_mask.nii.gz", blob(0)[1])
    for path in folder.glob("*_image.nii.gz"):
        path.unlink()
    report = engine.Report()
    result = engine.evaluate(tmp_path / "masks", folder, report=report)
    assert set(result["cases"]) == {"case0", "case1", "case2"} and result["mean"]["dice"] == 1
    (failure,) = report.failed
    assert "stranger_mask.nii.gz: has no label" in failure[1]

# SPDX-License-Identifier: Apache-2.0
"""Channels, windows, the foreground, and labels whose lesions survive a new spacing."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from engine.conftest import AFFINE, blob, write

from grcsf_kernels import engine
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine import DataConfig, InputError
from grcsf_kernels.engine.data.samples import Preprocessing, load_sample
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.nifti import Volume, read_image, read_label, read_volume


def volume(array, affine=None):
    affine = np.eye(4) if affine is None else affine
    return Volume(array.astype(np.float32), affine, nib.Nifti1Header(), "made.nii.gz")


def test_channels_are_normalized_on_their_own(tmp_path):
    first, second = blob(0)[0], 1000 + 3 * blob(1)[0]
    paths = [write(tmp_path / f"a_000{i}.nii.gz", x) for i, x in enumerate((first, second))]
    image = Preprocessing(DataConfig()).image(read_image(paths))
    for channel, path in zip(image, paths, strict=True):
        alone = Preprocessing(DataConfig()).image(read_volume(path))
        assert torch.equal(torch.as_tensor(channel), torch.as_tensor(alone[0]))


@pytest.mark.parametrize("fault", ["shape", "affine"])
def test_channels_that_do_not_fit(tmp_path, fault):
    other, affine = blob(1)[0], AFFINE.copy()
    if fault == "shape":
        other = other[:-1]
    affine[0, 3] += fault == "affine"
    paths = [write(tmp_path / "a_0000.nii.gz", blob(0)[0])]
    paths.append(write(tmp_path / "a_0001.nii.gz", other, affine))
    with pytest.raises(InputError, match=rf"a_0001.nii.gz: has .*{fault}"):
        read_image(paths)


def test_a_window_for_each_channel():
    array = np.stack([np.full((4, 4, 4), 50.0), np.full((4, 4, 4), 5.0)], axis=-1)
    config = DataConfig(intensity="window", channel_windows=((0.0, 100.0), (4.0, 8.0)))
    image = Preprocessing(config).image(volume(array))
    assert image[0].unique().tolist() == [0.5] and image[1].unique().tolist() == [0.25]
    with pytest.raises(InputError, match="has 1 channel"):
        Preprocessing(config).image(volume(array[..., 0]))
    config.channel_windows = ((0.0, 1.0), (2.0, 2.0))
    with pytest.raises(InputError, match="channel_windows: is"):
        check(config)


@pytest.mark.parametrize("spacing", [None, (1.3, 1.1, 1.7)])
def test_the_foreground_is_cut_and_put_back(tmp_path, spacing):
    """Every stage in the smaller space, the result in the file's own: shape, place and axes."""
    image, label = blob(0)
    image, label = (np.pad(part, ((7, 2), (0, 5), (3, 4))) for part in (image, label))
    case = Case(
        "a",
        write(tmp_path / "a_image.nii.gz", image),
        write(tmp_path / "a_label.nii.gz", label),
    )
    preprocessing = Preprocessing(DataConfig(crop_foreground=True, spacing=spacing))
    whole = Preprocessing(DataConfig(spacing=spacing))
    sample = load_sample(case, preprocessing, labels=True)
    full = load_sample(case, whole, labels=True)
    assert sample.image.numel() < 0.6 * full.image.numel()
    assert sample.label.shape[1:] == sample.image.shape[1:]
    restored = preprocessing.restore(sample.label, sample.image)[..., 0]
    assert restored.shape == image.shape
    if spacing is None:
        assert np.array_equal(restored, label)
    else:
        overlap = 2 * ((restored >= 0.5) & (label > 0)).sum()
        assert overlap / ((restored >= 0.5).sum() + label.sum()) > 0.85
    again = preprocessing.restore(sample.label, sample.image)[..., 0]
    assert np.array_equal(again, restored)  # MONAI spends what it undoes


def test_the_foreground_of_ct_is_above_the_window():
    array = np.full((8, 9, 10), -1000.0)
    array[2:5, 3:7, 4:6] = 40
    config = DataConfig(intensity="window", window=(-200.0, 300.0), crop_foreground=True)
    assert Preprocessing(config).image(volume(array)).shape == (1, 3, 4, 2)
    # Nothing but air: kept as it is.
    assert Preprocessing(config).image(volume(array * 0 - 1000)).shape == (1, 8, 9, 10)


@pytest.mark.parametrize("spacing", [0.5, 1.7, 3.0, 6.0])
def test_no_lesion_disappears_at_another_spacing(spacing):
    """Single voxels at all places of the grid, next to a lesion of ordinary size."""
    array = np.zeros((33, 30, 30))
    places = [(3, 4, 5), (3, 20, 10), (12, 3, 21), (25, 25, 25), (26, 4, 14), (0, 29, 29)]
    for place in places:
        array[place] = 1
    array[10:18, 12:20, 8:15] = 1
    preprocessing = Preprocessing(DataConfig(spacing=(spacing,) * 3))
    label = preprocessing.label(volume(array))
    linear = preprocessing.place(volume(array)) >= 0.5
    assert set(label.unique().tolist()) == {0, 1}
    found = torch.nonzero(label[0]).numpy() * spacing
    for place in places:
        assert np.abs(found - np.array(place)).max(axis=1).min() <= max(spacing, 1)
    if spacing > 1:  # what a threshold alone loses: the voxel in the far corner
        corner = -int(8 / spacing)
        assert not linear[0, corner:, corner:].any()
    # An ordinary lesion is as it was.
    region = tuple(
        slice(int(a / spacing), int(b / spacing)) for a, b in ((9, 19), (11, 21), (7, 16))
    )
    assert torch.equal(label[0][region] > 0, torch.as_tensor(linear[0][region]) > 0)


def test_lesion_labels_are_merged(tmp_path):
    image, label = blob(0)
    label = label * 2
    label[:2] = 3
    label[0, 0, 0] = 7
    like = read_volume(write(tmp_path / "a_image.nii.gz", image))
    path = write(tmp_path / "a_label.nii.gz", label)
    with pytest.raises(InputError, match=r"has labels 0, 2, 3, 7.*lesion_labels"):
        read_label(path, like)
    merged = read_label(path, like, (2, 7)).array
    assert np.array_equal(merged, np.isin(label, (2, 7)))
    fractions = write(tmp_path / "b_label.nii.gz", label * np.float32(0.3))
    with pytest.raises(InputError, match=r"has labels 0, 0\.6"):
        read_label(fractions, like, (2,))


def test_several_channels_go_all_the_way(tmp_path):
    """An nnU-Net data set of two channels: autoencoders, maps, network, masks, measures."""
    import json

    from engine.conftest import pretrain_config, residuals_config, train_config

    root = tmp_path / "Dataset001"
    for index in range(2):
        image, label = blob(index)
        write(root / f"imagesTr/c{index}_0000.nii.gz", image)
        write(root / f"imagesTr/c{index}_0001.nii.gz", 50 - 2 * image)
        write(root / f"labelsTr/c{index}.nii.gz", label * 4)
    labels = {"background": 0, "core": 2, "rim": 4}
    names = {"0": "T1", "1": "FLAIR"}
    (root / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": labels}))

    pretraining = pretrain_config(epochs=1)
    pretraining.model.mask_ratios = (0.5,)
    autoencoders = engine.pretrain(root, tmp_path / "mae", pretraining)
    report = engine.cache_residuals(root, autoencoders, tmp_path / "maps", residuals_config())
    assert nib.load(report.done[0]).shape in ((21, 18, 13), (21, 18, 13, 1))
    config = train_config(epochs=1)
    config.lesion_labels = (2, 4)
    model = engine.train(root, tmp_path / "run", config, tmp_path / "maps")
    options = engine.PredictConfig(device="cpu", residuals=residuals_config())
    report = engine.predict(root / "imagesTr", model, tmp_path / "masks", options, autoencoders)
    assert [path.name for path in report.done] == ["c0_mask.nii.gz", "c1_mask.nii.gz"]
    with pytest.raises(InputError, match=r"dataset.json: has the labels"):
        engine.evaluate(tmp_path / "masks", root)
    settings = engine.EvaluateConfig(lesion_labels=(2, 4))
    assert len(engine.evaluate(tmp_path / "masks", root, config=settings)["cases"]) == 2

    one = tmp_path / "one"
    write(one / "c0_image.nii.gz", blob(0)[0])
    report = engine.predict(one, model, tmp_path / "masks", options, autoencoders)
    (failure,) = report.failed
    assert "has 1 channel(s), and the model takes 2" in failure[1]
    report = engine.cache_residuals(one, autoencoders, tmp_path / "m", residuals_config())
    assert "has 1 channel(s), and the autoencoders take 2" in report.failed[0][1]

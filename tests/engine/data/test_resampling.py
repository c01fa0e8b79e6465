# SPDX-License-Identifier: Apache-2.0
"""Slab-wise placing and restoring against the whole-volume transforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine.conftest import AFFINE, write

from grcsf_kernels.engine import DataConfig
from grcsf_kernels.engine import buffers as scratch
from grcsf_kernels.engine.buffers import Scratch
from grcsf_kernels.engine.data import resampling as restore
from grcsf_kernels.engine.data.preprocessing import turned
from grcsf_kernels.engine.data.resampling import Placement, place_image
from grcsf_kernels.engine.data.samples import Preprocessing
from grcsf_kernels.engine.io.nifti import read_image, read_volume

DIAGONAL = np.diag([1.5, 0.7, 3.0, 1.0])
# x, y, z of the file are z, -x, y of the patient.
PERMUTED = np.array([[0, -1.0, 0, 3], [0, 0, 2.0, 4], [0.6, 0, 0, 5], [0, 0, 0, 1]])
FLIPPED = np.diag([-1.0, -2.0, -0.8, 1.0])
SHEARED = np.array([[1.0, 0.2, 0, 0], [0, 1.1, 0.3, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])
AFFINES = {
    "oblique": AFFINE,
    "diagonal": DIAGONAL,
    "permuted": PERMUTED,
    "flipped": FLIPPED,
    "sheared": SHEARED,
}


@pytest.fixture(autouse=True)
def thin_slabs(monkeypatch):
    """Volumes of a test are small: slabs of a few planes, so that there are many."""
    monkeypatch.setattr(scratch, "_SLAB", 2500)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (0.9, 2.3, 1.4)])
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("channels", [1, 2])
def test_is_what_whole_volumes_give(tmp_path, spacing, affine, where, channels):
    """Of several channels, too, and of the foreground alone."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (channels, 17, 14, 11)).astype(np.float32)
    image[:, :3] = image[..., 9:] = -1
    paths = [write(tmp_path / f"{i}.nii.gz", x, AFFINES[affine]) for i, x in enumerate(image)]
    expected = image[0] if channels == 1 else np.moveaxis(image, 0, -1)
    memory = Scratch(tmp_path, where, math.inf)
    for intensity, crop in (("zscore", False), ("window", False), ("window", True)):
        config = DataConfig(
            spacing=spacing, intensity=intensity, window=(-0.5, 0.8), crop_foreground=crop
        )
        preprocessing = Preprocessing(config)
        volume = read_image(paths, memory)
        assert np.array_equal(volume.array, expected)
        whole = preprocessing.image(read_image(paths))
        placement = Placement.of(volume, preprocessing)
        placed = place_image(volume, placement, preprocessing, memory)
        assert placed.shape == whole.shape
        torch.testing.assert_close(placed, whole.as_tensor(), rtol=0, atol=2e-5)
    assert not placement.whole

    maps = torch.rand(2, *whole.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = preprocessing.restore(maps, whole)
    restored = memory.image((*image.shape[1:], 2))
    restored[...] = 0
    view = placement.turn(restored)
    view[...] = np.nan
    count = 0
    for planes, values in placement.restore(maps):
        view[..., planes] = values
        count += 1
    assert count > 1
    np.testing.assert_allclose(restored, expected, rtol=0, atol=2e-5)


def test_views_share_memory():
    """Orientation costs nothing: flips and permutations are views."""
    array = np.zeros((3, 4, 5), np.uint8)
    for affine in AFFINES.values():
        assert np.shares_memory(turned(array, affine), array)


def test_boxes_are_small(tmp_path):
    """A slab of the result reads only the planes of the source that it lies between."""
    boxes = []

    def read(box):
        boxes.append(box)
        return torch.zeros(1, *(axis.stop - axis.start for axis in box))

    matrix = np.diag([1.0, 1.0, 0.5, 1.0])
    list(restore._resample(read, (10, 10, 100), matrix, (10, 10, 200)))
    assert len(boxes) > 10
    assert max(box[2].stop - box[2].start for box in boxes) <= 8
    assert boxes[-1][2].stop == 100


def test_a_constant_image_keeps_its_units(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.full((6, 6, 6), 0.1, np.float32))
    preprocessing = Preprocessing(DataConfig())
    volume = read_volume(path)
    placement = Placement.of(volume, preprocessing)
    placed = place_image(volume, placement, preprocessing, Scratch(tmp_path, "cpu", 0))
    assert placed.abs().max() < 1e-6


class TestScratch:
    def test_auto_goes_to_disk_beyond_the_limit_and_back(self, tmp_path):
        memory = Scratch(tmp_path, "auto", 1000)
        first = memory.volume(1, (5, 5, 5), np.float32)
        assert not memory._maps
        second = memory.volume(1, (10, 5, 5), np.float32)
        assert len(memory._maps) == 1
        second[...] = 7
        memory.release()
        assert (second == 7).all()
        del second
        assert not memory._maps
        del first
        third = memory.volume(1, (10, 5, 5), np.float32)
        assert not memory._maps and third.shape == (1, 10, 5, 5)
        assert not list(tmp_path.iterdir())  # no file has a name

    def test_a_full_disk_is_an_error_and_not_a_crash(self, tmp_path):
        with pytest.raises(OSError, match="scratch volumes") as caught:
            Scratch(tmp_path, "disk", 0).volume(1, (1 << 20, 1 << 20, 64), np.float32)
        assert caught.value.filename == str(tmp_path)

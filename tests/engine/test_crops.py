# SPDX-License-Identifier: Apache-2.0
"""Augmentation moves image, label and maps together, and follows from the row's own seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.conftest import train_config
from monai.data import MetaTensor

from grcsf_kernels.engine import AugmentationConfig, InputError, PretrainConfig
from grcsf_kernels.engine.config import check
from grcsf_kernels.engine.crops import Crops, LesionCrops, _coarse_axis
from grcsf_kernels.engine.data import Case, Sample, Samples

SHAPE = (40, 36, 32)


def soft_blob():
    """A smooth bump, so that linear interpolation of it is nearly exact."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    center = np.array([0.1, -0.2, 0.15])[:, None, None, None]
    return torch.tensor(np.exp(-6 * ((grid - center) ** 2).sum(0)), dtype=torch.float32)[None]


def samples(spacing=(1.0, 1.0, 1.0)):
    """Image and both maps are one picture; the label is where it is above one half."""
    image = soft_blob()
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    held = Samples(lambda case: pytest.fail("read again"), 1e9)
    for name in ("a", "b"):
        case = Case(name, name)
        picture = MetaTensor(image.clone(), affine=affine)
        maps = image.repeat(2, 1, 1, 1)
        held.add(case, Sample(case, None, picture, (image > 0.5).float(), maps))
    return held


def config(batch=4, **augmentation):
    settings = train_config(batch_size=batch)
    settings.crop_size = (20, 20, 20)
    settings.augmentation = AugmentationConfig(**augmentation)
    return settings


SPATIAL_ALONE = {
    "noise_probability": 0.0,
    "blur_probability": 0.0,
    "brightness_probability": 0.0,
    "contrast_probability": 0.0,
    "gamma_probability": 0.0,
    "low_resolution_probability": 0.0,
}


def test_maps_and_labels_stay_on_the_image():
    crops = LesionCrops(samples(), config(12, affine_probability=1.0, **SPATIAL_ALONE), 0)
    batch, names = crops(0, 0)
    image, label, first, second = batch.unbind(1)
    assert batch.shape == (12, 4, 20, 20, 20) and set(names.split(", ")) == {"a", "b"}
    assert torch.equal(image, first) and torch.equal(image, second)
    # Nearest takes a voxel at most half a voxel away on each axis: by the bump's slope 0.17.
    assert (image[label > 0] > 0.5 - 0.18).all() and (image[label == 0] < 0.5 + 0.18).all()
    assert set(label.unique().tolist()) == {0, 1}
    # They were moved: what is left in place is a block of the picture, to the bit.
    blocks = soft_blob()[0].unfold(0, 20, 1).unfold(1, 20, 1).unfold(2, 20, 1)
    values = {float(block.sum()) for block in blocks.reshape(-1, 20**3)}
    sums = [float(crop.flip(axes).sum()) for crop in image for axes in [()]]
    assert not values & set(sums)


def test_intensities_change_the_image_alone():
    chances = {name: 1.0 for name in SPATIAL_ALONE}
    crops = LesionCrops(samples(), config(affine_probability=0.0, **chances), 0)
    image, label, first, second = crops(0, 0)[0].unbind(1)
    assert torch.equal(first, second) and torch.equal(label, (first > 0.5).float())
    assert torch.isfinite(image).all()
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(image, first, strict=True))


def test_nothing_but_mirrors_when_switched_off():
    crops = LesionCrops(samples(), config(affine_probability=1.0, enabled=False), 0)
    image, _, first, _ = crops(0, 0)[0].unbind(1)
    assert torch.equal(image, first)


def test_constant_images_stay_finite():
    held = samples()
    for case in held.cases:
        held._kept[case].image[:] = 0
    chances = {name: 1.0 for name in SPATIAL_ALONE}
    crops = LesionCrops(held, config(affine_probability=1.0, **chances), 0)
    assert torch.isfinite(crops(0, 0)[0]).all()


@pytest.mark.parametrize("kind", ["training", "pretraining"])
def test_rows_of_a_batch_equal_the_whole(kind):
    """What a process makes of its part is to the bit what one process makes of it all."""
    if kind == "training":
        chances = {name: 0.5 for name in SPATIAL_ALONE}
        settings = config(5, affine_probability=0.5, **chances)
        one, two = (LesionCrops(samples(), settings, 3) for _ in range(2))
    else:
        settings = PretrainConfig(crop_size=(16, 16, 16))
        settings.optimization.batch_size = 5
        one, two = (Crops(samples(), settings, 3) for _ in range(2))
    whole, names = one(1, 2)
    part, some = two(1, 2, [4, 1])
    assert torch.equal(part, whole[[4, 1]])
    assert some.split(", ") == [names.split(", ")[i] for i in (4, 1)]
    assert torch.equal(one(1, 2)[0], whole)
    assert not torch.equal(one(1, 3)[0], whole) and not torch.equal(one(2, 2)[0], whole)
    assert len({float(row.sum()) for row in whole}) == 5


def test_thick_slices_are_rotated_in_their_plane_alone():
    held = samples((0.8, 0.8, 6.5))
    assert _coarse_axis(held[0]) == 2 and _coarse_axis(samples()[0]) is None
    changes = SPATIAL_ALONE | {"affine_probability": 1.0, "scaling": (1.0, 1.0)}
    settings = config(4, **changes)
    settings.mirror_axes = (2,)
    for case in held.cases:  # every slice constant, and no two alike
        held._kept[case].image[:] = torch.arange(1.0, 33.0)
    settings.crop_size = (12, 12, 16)
    image = LesionCrops(held, settings, 0)(0, 0)[0][:, 0]
    middle = image[:, 4:8, 4:8]
    # Along an axis out of the plane the values would run; here a slice is a slice.
    assert (middle.amax((1, 2)) - middle.amin((1, 2))).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("affine_probability", 1.5),
        ("noise", -1.0),
        ("scaling", (1.2, 0.8)),
        ("gamma", (0.0, 1.0)),
        ("low_resolution", (0.5, 1.5)),
        ("contrast", 2.0),
        ("rotation", (-1.0, 0.0, 0.0)),
    ],
)
def test_augmentation_out_of_range(name, value):
    settings = config(**{name: value})
    with pytest.raises(InputError, match=f"^augmentation.{name}: is"):
        check(settings)

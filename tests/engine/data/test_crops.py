# SPDX-License-Identifier: Apache-2.0
"""Augmentation moves image, label and maps together, and follows from the place's own seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.conftest import train_config
from monai.data import MetaTensor

from grcsf_kernels.common.settings import check
from grcsf_kernels.engine import AugmentationConfig, InputError, PretrainConfig
from grcsf_kernels.engine.data.crops import Crops, LesionCrops, _coarse_axis
from grcsf_kernels.engine.data.samples import Sample, Samples
from grcsf_kernels.engine.io.datasets import Case

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


def batch_of(crops, count):
    made, names = zip(*(crops(0, place) for place in range(count)), strict=True)
    return torch.cat(made), names


def config(**augmentation):
    settings = train_config()
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
    crops = LesionCrops(samples(), config(affine_probability=1.0, **SPATIAL_ALONE), 0)
    batch, names = batch_of(crops, 12)
    image, label, first, second = batch.unbind(1)
    assert batch.shape == (12, 4, 20, 20, 20) and set(names) == {"a", "b"}
    assert torch.equal(image, first) and torch.equal(image, second)
    # Nearest takes a voxel at most half a voxel away on each axis: by the bump's slope 0.17. Next
    # to what is padded, also beyond the edge of the crop, the image fades and the label does not.
    padded = torch.nn.functional.pad((image == 0).float(), [1] * 6, value=1)
    inside = torch.nn.functional.max_pool3d(padded, 3, 1) == 0
    assert (image[(label > 0) & inside] > 0.5 - 0.18).all()
    assert (image[(label == 0) & inside] < 0.5 + 0.18).all()
    assert inside.float().mean() > 0.6
    assert set(label.unique().tolist()) == {0, 1}
    # They were moved: what is left in place is a block of the picture, to the bit.
    blocks = soft_blob()[0].unfold(0, 20, 1).unfold(1, 20, 1).unfold(2, 20, 1)
    values = {float(block.sum()) for block in blocks.reshape(-1, 20**3)}
    sums = [float(crop.flip(axes).sum()) for crop in image for axes in [()]]
    assert not values & set(sums)


def test_intensities_change_the_image_alone():
    chances = {name: 1.0 for name in SPATIAL_ALONE}
    crops = LesionCrops(samples(), config(affine_probability=0.0, **chances), 0)
    image, label, first, second = batch_of(crops, 4)[0].unbind(1)
    assert torch.equal(first, second) and torch.equal(label, (first > 0.5).float())
    assert torch.isfinite(image).all()
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(image, first, strict=True))


def test_nothing_but_mirrors_when_switched_off():
    crops = LesionCrops(samples(), config(affine_probability=1.0, enabled=False), 0)
    image, _, first, _ = batch_of(crops, 4)[0].unbind(1)
    assert torch.equal(image, first)


def test_constant_images_stay_finite():
    held = samples()
    for case in held.cases:
        held._kept[case].image[:] = 0
    chances = {name: 1.0 for name in SPATIAL_ALONE}
    crops = LesionCrops(held, config(affine_probability=1.0, **chances), 0)
    assert torch.isfinite(batch_of(crops, 4)[0]).all()


@pytest.mark.parametrize("kind", ["training", "pretraining"])
def test_a_crop_is_a_function_of_its_place(kind):
    """What a process makes of its part is to the bit what one process makes of it all."""
    if kind == "training":
        chances = {name: 0.5 for name in SPATIAL_ALONE}
        settings = config(affine_probability=0.5, **chances)
        one, two = (LesionCrops(samples(), settings, 3) for _ in range(2))
    else:
        settings = PretrainConfig(crop_size=(16, 16, 16))
        one, two = (Crops(samples(), settings, 3) for _ in range(2))
    whole = [one(1, place) for place in range(5)]
    for place in (4, 1):
        crop, name = two(1, place)
        assert torch.equal(crop, whole[place][0]) and name == whole[place][1]
    assert not torch.equal(one(2, 1)[0], whole[1][0])
    assert len({float(crop.sum()) for crop, _ in whole}) == 5


def test_thick_slices_are_rotated_in_their_plane_alone():
    held = samples((0.8, 0.8, 6.5))
    assert _coarse_axis(held[0]) == 2 and _coarse_axis(samples()[0]) is None
    changes = SPATIAL_ALONE | {"affine_probability": 1.0, "scaling": (1.0, 1.0)}
    settings = config(**changes)
    settings.mirror_axes = (2,)
    for case in held.cases:  # every slice constant, and no two alike
        held._kept[case].image[:] = torch.arange(1.0, 33.0)
    settings.crop_size = (12, 12, 16)
    image = batch_of(LesionCrops(held, settings, 0), 4)[0][:, 0]
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

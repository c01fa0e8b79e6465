# SPDX-License-Identifier: Apache-2.0
"""Augmented crops, for pretraining and for training.

Every crop is a function of the seed, the epoch and its place among the crops of the epoch, so a
process may make only some of them, in any order, and gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.data.utils import affine_to_spacing
from monai.transforms import (
    Compose,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    SpatialPad,
    SpatialPadd,
    Transform,
    map_binary_to_indices,
)
from numpy.typing import NDArray
from torch import Tensor

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.config import AugmentationConfig, PretrainConfig, TrainConfig
from grcsf_kernels.engine.data.samples import Sample, Samples
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.seeding import seed_of

# An axis whose voxels are this many times longer than the others is not rotated out of its plane:
# in-plane detail would be smeared over slices.
_COARSE = 3.0
_CENTERS = 1 << 16  # healthy voxels of a case that crops may be centered on, drawn once


class _CropsOfCases:
    """Picks a case for each place and makes its crop, from the place's own seed."""

    def __init__(self, samples: Samples, keys: list[str], seed: int) -> None:
        self._samples, self._keys, self._seed = samples, keys, seed

    def __call__(self, epoch: int, place: int) -> tuple[Tensor, str]:
        """One crop.

        Args:
            epoch: from 0.
            place: of the crop among all crops of the epoch, from 0.

        Returns:
            [1, N, *crop] float32: the channels of image, label and maps one after the other, as
            far as there are; and the name of the case.
        """
        generator = torch.Generator().manual_seed(seed_of(self._seed, epoch, place, 2))
        pick = int(torch.randint(len(self._samples), (1,), generator=generator))
        crop = self._crop(self._samples[pick], seed_of(self._seed, epoch, place, 3))
        return crop[None], self._samples.names[pick]

    def _crop(self, sample: Sample, seed: int) -> Tensor:
        # Made anew, which takes a millisecond: transforms keep their random state, and crops may be
        # made by several threads.
        transform = self._transform(_coarse_axis(sample))
        transform.set_random_state(seed=seed)
        parts = {key: torch.as_tensor(getattr(sample, key)) for key in self._keys}
        parts = {key: part.as_subclass(Tensor) for key, part in parts.items()}
        crop = transform(parts | self._more(sample))
        if isinstance(crop, list):  # RandCropByPosNegLabeld makes a list of its samples
            (crop,) = crop
        return torch.cat([torch.as_tensor(crop[k]).as_subclass(Tensor) for k in self._keys])

    def _more(self, sample: Sample) -> dict[str, NDArray[np.int64]]:
        """What the transforms need beside the tensors."""
        return {}

    def _transform(self, coarse: int | None) -> Compose:
        raise NotImplementedError


class Crops(_CropsOfCases):
    """Random crops of images for pretraining, mirrored: [1, C, *crop] each.

    Args:
        samples: the cases.
        config: crop size, mirroring.
        seed: of everything random.
    """

    def __init__(self, samples: Samples, config: PretrainConfig, seed: int) -> None:
        super().__init__(samples, ["image"], seed)
        self._config = config
        self._transform(None)  # errors of the settings now, not at the first step

    def _transform(self, coarse: int | None) -> Compose:
        keys, config = self._keys, self._config
        return Compose(
            [
                SpatialPadd(keys, config.crop_size),
                RandSpatialCropd(keys, config.crop_size, random_size=False),
                *mirrors(keys, config.mirror_axes),
            ]
        )


class LesionCrops(_CropsOfCases):
    """Augmented crops, mostly around lesions: [1, C + 1 + K, *crop] each, image, label and maps.

    Image, label and residual maps go through the same spatial transforms, the label by nearest
    neighbor and the others linearly.

    Args:
        samples: the cases, with labels.
        config: crop size, augmentation.
        seed: of everything random.
    """

    def __init__(self, samples: Samples, config: TrainConfig, seed: int) -> None:
        keys = ["image", "label"] + ([] if samples[0].residual is None else ["residual"])
        super().__init__(samples, keys, seed)
        self._config = config
        self._centers: dict[Case, dict[str, NDArray[np.int64]]] = {}
        self._transform(None)  # errors of the settings now, not at the first step

    def _more(self, sample: Sample) -> dict[str, NDArray[np.int64]]:
        """Voxels of the padded volume that crops are centered on, found once a case."""
        if sample.case not in self._centers:
            assert sample.label is not None
            label = SpatialPad(self._config.crop_size)(sample.label)
            lesion, rest = map_binary_to_indices(torch.as_tensor(label))
            # As int64 the healthy voxels take twice the memory of the image.
            rng = np.random.default_rng(0)
            rest = rest if len(rest) <= _CENTERS else rng.choice(rest, _CENTERS, replace=False)
            self._centers[sample.case] = {"lesion": np.asarray(lesion), "rest": np.asarray(rest)}
        return self._centers[sample.case]

    def _transform(self, coarse: int | None) -> Compose:
        keys, config = self._keys, self._config
        return Compose(
            [
                SpatialPadd(keys, config.crop_size),
                # Around the voxel first, then the crop anywhere in there: were the lesion always at
                # the center, a network would learn the place and not the lesion.
                RandCropByPosNegLabeld(
                    keys,
                    label_key="label",
                    spatial_size=[size * 3 // 2 for size in config.crop_size],
                    pos=config.foreground,
                    neg=1 - config.foreground,
                    num_samples=1,
                    fg_indices_key="lesion",
                    bg_indices_key="rest",
                    allow_smaller=True,
                ),
                _cut(keys, config.crop_size, config.augmentation, coarse),
                *mirrors(keys, config.mirror_axes),
                *_intensities(config.augmentation),
            ]
        )


def _coarse_axis(sample: Sample) -> int | None:
    """The axis whose voxels are at least ``_COARSE`` times as long as those of both others."""
    spacing = affine_to_spacing(torch.as_tensor(sample.image.affine)).tolist()
    longest = max(range(3), key=lambda axis: spacing[axis])
    others = max(size for axis, size in enumerate(spacing) if axis != longest)
    return longest if spacing[longest] >= _COARSE * others else None


def _cut(
    keys: list[str], crop: Sequence[int], config: AugmentationConfig, coarse: int | None
) -> Transform:
    """The crop out of a larger piece, sometimes rotated and scaled, with real voxels around it."""
    plain = RandSpatialCropd(keys, crop, random_size=False)
    probability = config.affine_probability if config.enabled else 0.0
    if not probability:
        return plain
    angles = [
        math.radians(angle) if coarse in (None, axis) else 0.0
        for axis, angle in enumerate(config.rotation)
    ]
    low, high = config.scaling
    moved = RandAffined(
        keys,
        prob=1.0,
        spatial_size=crop,
        rotate_range=angles,
        scale_range=[(low - 1, high - 1)] * 3,  # of the size of what is seen
        mode=["nearest" if key == "label" else "bilinear" for key in keys],
        padding_mode="zeros",
    )
    # A quarter larger in every direction together: as much as a rotated crop usually needs.
    piece = RandSpatialCropd(keys, [size * 5 // 4 for size in crop], random_size=False)
    return OneOf([Compose([piece, moved]), plain], weights=[probability, 1 - probability])


def _intensities(config: AugmentationConfig) -> list[Transform]:
    """On the image alone."""
    if not config.enabled:
        return []
    keys, sigma = ["image"], config.blur
    return [
        RandGaussianNoised(keys, config.noise_probability, std=config.noise),
        RandGaussianSmoothd(keys, sigma, sigma, sigma, prob=config.blur_probability),
        RandScaleIntensityd(keys, config.brightness, prob=config.brightness_probability),
        RandScaleIntensityFixedMeand(
            keys, config.contrast, prob=config.contrast_probability, fixed_mean=True
        ),
        RandSimulateLowResolutiond(
            keys, config.low_resolution_probability, zoom_range=config.low_resolution
        ),
        RandAdjustContrastd(keys, config.gamma_probability, config.gamma, retain_stats=True),
    ]


def mirrors(keys: Sequence[str], axes: Sequence[int]) -> list[Transform]:
    """Random mirroring along each of ``axes``, half of the time.

    Raises:
        InputError: an axis other than 0, 1 and 2.
    """
    if any(axis not in (0, 1, 2) for axis in axes):
        raise InputError("mirror_axes", f"is {tuple(axes)}", "expected axes among 0, 1 and 2")
    return [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]

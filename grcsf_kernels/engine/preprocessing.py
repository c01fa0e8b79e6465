# SPDX-License-Identifier: Apache-2.0
"""How a volume becomes a tensor, and how what a network says of it comes back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CropForeground,
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    Spacing,
    Transform,
)
from scipy import ndimage
from torch import Tensor

from grcsf_kernels.engine.config import DataConfig
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.volumes import Volume

# First and last voxel (exclusive) of the foreground per axis, in RAS orientation.
Box = tuple[np.ndarray, np.ndarray]


class Preprocessing:
    """Volume to tensor and back: RAS orientation, foreground, spacing, intensities.

    Args:
        config: what to do.

    Raises:
        InputError: an unknown ``intensity``.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        # One instance each: MONAI undoes an operation only with the transform that did it.
        self._orientation = Orientation("RAS", labels=None)
        self._foreground = CropForeground(self._is_foreground, allow_smaller=True)
        self._spacing: Spacing | None = None
        if config.spacing is not None:
            self._spacing = Spacing(config.spacing, align_corners=False, dtype=np.float32)
        self._intensity: Transform = NormalizeIntensity(nonzero=True, channel_wise=True)
        if config.intensity not in ("zscore", "window"):
            raise InputError(
                "data.intensity", f"is {config.intensity!r}", "expected zscore or window"
            )

    def image(self, volume: Volume, box: Box | None = None) -> MetaTensor:
        """[C, *S] float32, normalized; within ``box``, by default that of :meth:`box`.

        Raises:
            InputError: the volume has another number of channels than ``data.channel_windows``.
        """
        placed = self.place(volume, self.box(volume) if box is None else box)
        if self.config.intensity == "zscore":
            return _meta(self._intensity(placed))
        for channel, window in enumerate(self._windows(placed.shape[0], volume)):
            # From 0: volumes are padded with 0, which has to be the least dense value.
            scale = ScaleIntensityRange(*window, 0.0, 1.0, clip=True)
            placed[channel] = torch.as_tensor(scale(_plain(placed[channel])))
        return placed

    def place(self, volume: Volume, box: Box | None = None) -> MetaTensor:
        """[K, *S] in RAS orientation within ``box`` (None: all) at the spacing, linear."""
        placed = self._cut(volume, box)
        return placed if self._spacing is None else _meta(self._spacing(placed))

    def label(self, volume: Volume, box: Box | None = None) -> Tensor:
        """[1, *S] float32 of 0 and 1 from a mask, placed like its image.

        Linear interpolation and a threshold of one half; a lesion that is too small for that is
        taken by nearest neighbor, and where all of its voxels fall between the new ones, the voxel
        that most of them are next to is set. So no connected lesion disappears.
        """
        cut = self._cut(volume, box)
        if self._spacing is None:
            return (_plain(cut) >= 0.5).float()
        placed = _meta(self._spacing(cut))
        label = _plain(placed) >= 0.5
        lesions, count = ndimage.label(cut[0].numpy() > 0.5, np.ones((3, 3, 3)))
        voxels = np.argwhere(lesions)
        of = lesions[tuple(voxels.T)]
        change = np.linalg.inv(np.asarray(placed.affine)) @ np.asarray(cut.affine)
        moved = np.rint(voxels @ change[:3, :3].T + change[:3, 3]).astype(int)
        moved = np.clip(moved, 0, np.array(label.shape[1:]) - 1)
        kept = np.unique(of[label[0].numpy()[tuple(moved.T)]])
        lost = np.setdiff1d(np.arange(1, count + 1), kept)
        if lost.size:
            small = np.where(np.isin(lesions, lost), lesions, 0).astype(np.float32)
            piece = MetaTensor(torch.as_tensor(small[None]), affine=cut.affine)
            nearest = _plain(self._spacing(piece, mode="nearest"))
            label |= nearest > 0
            for lesion in np.setdiff1d(lost, np.unique(nearest.numpy())):
                places, votes = np.unique(moved[of == lesion], axis=0, return_counts=True)
                label[0][tuple(places[votes.argmax()])] = True
        return label.float()

    def box(self, volume: Volume) -> Box | None:
        """Where the foreground of an image is; None without ``data.crop_foreground``.

        Foreground is what is not 0 in any channel, or with windows what is above the lower end of
        its channel's window. A volume without any is foreground as a whole.
        """
        if not self.config.crop_foreground:
            return None
        placed = _meta(self._orientation(_tensor(volume)))
        if not self._is_foreground(placed).any():
            return np.zeros(3, int), np.array(placed.shape[1:])
        return self._foreground.compute_bounding_box(placed)

    def restore(self, maps: Tensor, placed: MetaTensor) -> np.ndarray:
        """[K, *S] in the space of ``placed`` back to the voxels of its file: [X, Y, Z, K].

        0 outside of the foreground that was cut out.

        Raises:
            ValueError: ``placed`` was not made by this object (it may come from ``cache_dir``).
        """
        if not placed.applied_operations:
            raise ValueError("Preprocessing.restore: placed does not say how it was made")
        tensor: Any = MetaTensor(
            maps.detach().float().cpu(),
            affine=placed.affine,
            # MONAI changes these on the way back.
            applied_operations=copy.deepcopy(placed.applied_operations),
        )
        if self._spacing is not None:
            tensor = self._spacing.inverse(tensor)
        if self.config.crop_foreground:
            tensor = self._foreground.inverse(tensor)
        restored = self._orientation.inverse(tensor)
        return np.ascontiguousarray(torch.as_tensor(restored).movedim(0, -1).numpy())

    def _cut(self, volume: Volume, box: Box | None) -> MetaTensor:
        placed = _meta(self._orientation(_tensor(volume)))
        if self.config.crop_foreground:
            start, end = (np.zeros(3, int), np.array(placed.shape[1:])) if box is None else box
            placed = _meta(self._foreground.crop_pad(placed, start, end))
        return placed

    def _windows(self, channels: int, volume: Volume) -> tuple[tuple[float, float], ...]:
        windows = self.config.channel_windows or (self.config.window,) * channels
        if len(windows) != channels:
            raise InputError(
                volume.path,
                f"has {channels} channel(s)",
                f"expected {len(windows)}, one for each of data.channel_windows",
            )
        return windows

    def _is_foreground(self, image: Tensor) -> Tensor:
        if self.config.intensity == "zscore":
            return image != 0
        windows = self.config.channel_windows or (self.config.window,) * image.shape[0]
        lower = torch.tensor([low for low, _ in windows[: image.shape[0]]])
        return image > lower[:, None, None, None]


def _tensor(volume: Volume) -> MetaTensor:
    array = torch.as_tensor(np.array(volume.array, copy=True))
    channels = array[None] if array.ndim == 3 else array.movedim(-1, 0)
    return MetaTensor(channels.contiguous(), affine=torch.as_tensor(volume.affine))


def _meta(tensor: Any) -> MetaTensor:
    assert isinstance(tensor, MetaTensor)
    return tensor


def _plain(tensor: Any) -> Tensor:
    return torch.as_tensor(tensor).as_subclass(Tensor)

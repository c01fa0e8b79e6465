# SPDX-License-Identifier: Apache-2.0
"""How a volume becomes a tensor, and how what a network says of it comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import nibabel as nib
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

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.buffers import slabs
from grcsf_kernels.engine.connectivity import NEIGHBORS
from grcsf_kernels.engine.io.nifti import Volume
from grcsf_kernels.models.inputs import DataConfig

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
        for channel, scale in zip(placed, self._scales(placed.shape[0], volume), strict=True):
            channel.copy_(_plain(scale(_plain(channel))))
        return placed

    def intensities(
        self, volume: Volume, pieces: Callable[[], Iterable[Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces [C, X, Y, planes] of a placed volume and what :meth:`image` makes of them.

        Args:
            volume: which, for the messages.
            pieces: gives the pieces anew at every call: statistics come before values.

        Raises:
            InputError: as for :meth:`image`.
        """
        if self.config.intensity == "zscore":
            means, deviations = _statistics(pieces)
            normalize = NormalizeIntensity(means, deviations, nonzero=True, channel_wise=True)
            for piece in pieces():
                yield piece, _plain(normalize(piece))
            return
        for piece in pieces():
            scales = self._scales(piece.shape[0], volume)
            scaled = [_plain(scale(channel)) for channel, scale in zip(piece, scales, strict=True)]
            yield piece, torch.stack(scaled)

    def grid(
        self, shape: Sequence[int], affine: np.ndarray, box: Box | None = None
    ) -> tuple[tuple[int, ...], np.ndarray]:
        """Size and affine that :meth:`place` gives a volume of a shape and an affine."""
        # One value, seen as a volume: MONAI works out the geometry without touching voxels.
        seen = MetaTensor(torch.zeros(1).expand(1, *shape), affine=torch.as_tensor(affine))
        placed = _meta(self._orientation(seen, lazy=True))
        size, affine = _pending(placed)
        if box is not None:
            start, end = box
            moved = np.eye(4)
            moved[:3, 3] = start
            size, affine = tuple(int(n) for n in np.subtract(end, start)), affine @ moved
        if self._spacing is not None:
            seen = MetaTensor(torch.zeros(1).expand(1, *size), affine=torch.as_tensor(affine))
            size, affine = _pending(_meta(self._spacing(seen, lazy=True)))
        return size, affine

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
        lesions, count = ndimage.label(cut[0].numpy() > 0.5, NEIGHBORS)
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
        image = turned(volume.array, volume.affine)
        size = image.shape[1:]
        found = [np.zeros(n, bool) for n in size]
        for planes in slabs(size[0] * size[1] * image.shape[0], size[2]):
            piece = torch.from_numpy(np.ascontiguousarray(image[..., planes]))
            inside = self._is_foreground(piece).any(dim=0).numpy()
            found[0] |= inside.any(axis=(1, 2))
            found[1] |= inside.any(axis=(0, 2))
            found[2][planes] = inside.any(axis=(0, 1))
        if not found[0].any():
            return np.zeros(3, int), np.array(size)
        ends = [np.flatnonzero(axis)[[0, -1]] for axis in found]
        return np.array([end[0] for end in ends]), np.array([end[1] + 1 for end in ends])

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

    def _scales(self, channels: int, volume: Volume) -> list[Transform]:
        """One for each channel."""
        windows = self.config.channel_windows or (self.config.window,) * channels
        if len(windows) != channels:
            raise InputError(
                volume.path,
                f"has {channels} channel(s)",
                f"expected {len(windows)}, one for each of data.channel_windows",
            )
        # From 0: volumes are padded with 0, which has to be the least dense value.
        return [ScaleIntensityRange(*window, 0.0, 1.0, clip=True) for window in windows]

    def _is_foreground(self, image: Tensor) -> Tensor:
        if self.config.intensity == "zscore":
            return image != 0
        windows = self.config.channel_windows or (self.config.window,) * image.shape[0]
        lower = torch.tensor([low for low, _ in windows[: image.shape[0]]])
        return image > lower[:, None, None, None]


def turned(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The view [C, X, Y, Z] in RAS order of a file's array [X, Y, Z] or [X, Y, Z, C]."""
    view = nib.orientations.apply_orientation(array, nib.orientations.io_orientation(affine))
    return view[None] if view.ndim == 3 else np.moveaxis(view, -1, 0)


def _pending(tensor: MetaTensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Size and affine after the lazy operations on a tensor."""
    size = tuple(int(n) for n in tensor.peek_pending_shape())
    return size, np.asarray(tensor.peek_pending_affine())


def _statistics(pieces: Callable[[], Iterable[Tensor]]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel's values that are not 0; 0 and 1 where there are none."""
    count = total = torch.zeros(0)
    for piece in pieces():
        values = piece.flatten(1)
        sums = values.sum(dim=1, dtype=torch.float64)
        numbers = values.count_nonzero(dim=1)
        count = numbers if not len(count) else count + numbers
        total = sums if not len(total) else total + sums
    mean = total / count.clamp(min=1)
    square = torch.zeros_like(mean)
    for piece in pieces():
        for channel, values in enumerate(piece):
            off = values[values != 0].double().sub_(mean[channel])
            square[channel] += off.dot(off)
    deviation = (square / count.clamp(min=1)).sqrt()
    # A constant has no deviation but what rounding leaves, and stays in its units.
    kept = torch.where(deviation > 1e-7 * mean.abs(), deviation, torch.ones_like(deviation))
    return mean.tolist(), kept.tolist()


def _tensor(volume: Volume) -> MetaTensor:
    array = torch.as_tensor(np.array(volume.array, copy=True))
    channels = array[None] if array.ndim == 3 else array.movedim(-1, 0)
    return MetaTensor(channels.contiguous(), affine=torch.as_tensor(volume.affine))


def _meta(tensor: Any) -> MetaTensor:
    assert isinstance(tensor, MetaTensor)
    return tensor


def _plain(tensor: Any) -> Tensor:
    return torch.as_tensor(tensor).as_subclass(Tensor)

# SPDX-License-Identifier: Apache-2.0
"""Resample volumes between file space and network space, slab by slab.

The same to rounding as :class:`grcsf_kernels.engine.data.preprocessing.Preprocessing`, which works
on whole volumes with several copies; here nothing but the two volumes themselves is ever large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import AffineTransform
from torch import Tensor

from grcsf_kernels.engine.buffers import Scratch, as_tensor, slabs
from grcsf_kernels.engine.data.preprocessing import Preprocessing, turned
from grcsf_kernels.engine.data.samples import Sample
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.nifti import Volume, read_image

# As large a difference of affines as MONAI overlooks.
_SAME = 1e-3

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Placement:
    """Where the voxels of a file lie in the volume that networks see.

    Attributes:
        file: affine of the file.
        inside: the foreground, of the file's volume with its axes in RAS order.
        whole: whether that is all of it.
        source: size of the foreground.
        space: size of the volume that networks see.
        matrix: [4, 4], voxel indices of that volume to those of the foreground.
    """

    file: np.ndarray
    inside: Box
    whole: bool
    source: tuple[int, ...]
    space: tuple[int, ...]
    matrix: np.ndarray

    @classmethod
    def of(cls, volume: Volume, preprocessing: Preprocessing) -> Placement:
        """The placement of a volume."""
        shape, box = volume.array.shape[:3], preprocessing.box(volume)
        orientation = nib.orientations.io_orientation(volume.affine)
        oriented = tuple(shape[axis] for axis in np.argsort(orientation[:, 0]))
        start, end = (np.zeros(3, int), np.array(oriented)) if box is None else box
        first = volume.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
        first[:3, 3] += first[:3, :3] @ start
        source = tuple(int(n) for n in end - start)
        space, affine = preprocessing.grid(shape, volume.affine, box)
        inside = tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))
        return cls(
            volume.affine, inside, source == oriented, source, space, np.linalg.solve(first, affine)
        )

    def turn(self, array: np.ndarray) -> np.ndarray:
        """The view [C, *source] of a file's array [X, Y, Z] or [X, Y, Z, C]: its foreground."""
        inside = (slice(None), *self.inside)
        return turned(array, self.file)[inside]

    def place(self, array: np.ndarray, out: Tensor, done: Callable[[], None]) -> None:
        """A file's array [X, Y, Z] or [X, Y, Z, K] into ``out`` [K, *space]."""
        view = self.turn(array)

        def read(box: Box) -> Tensor:
            # A copy: torch has no negative strides, and readers hold one box at a time.
            place = (slice(None), *box)
            return torch.from_numpy(np.ascontiguousarray(view[place]))

        for planes, values in _resample(read, self.source, self.matrix, self.space):
            out[..., planes] = values
            done()

    def restore(self, maps: Tensor) -> Iterator[tuple[slice, np.ndarray]]:
        """Maps in the space of networks, in slabs of the foreground.

        Args:
            maps: [K, *space], of any floating dtype and on any device.

        Yields:
            Planes of the last axis, and their values [K, X, Y, planes]: for views that
            :meth:`turn` gave.
        """

        def read(box: Box) -> Tensor:
            place = (slice(None), *box)
            return maps[place].float().cpu()

        back = np.linalg.inv(self.matrix)
        for planes, values in _resample(read, self.space, back, self.source):
            yield planes, values.numpy()

    def fill(
        self,
        maps: Tensor,
        outputs: Sequence[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]],
        done: Callable[[], None],
    ) -> None:
        """Write what functions make of restored maps into arrays of the file's size.

        Args:
            maps: as for :meth:`restore`.
            outputs: arrays [X, Y, Z] or [X, Y, Z, K], and what makes their values from those of
                the maps, voxel by voxel. 0 outside of the foreground.
            done: called whenever planes are finished.
        """
        if not self.whole:
            for array, _ in outputs:
                array[...] = 0
        views = [(self.turn(array), make) for array, make in outputs]
        for planes, values in self.restore(maps):
            for view, make in views:
                view[..., planes] = make(values)
            done()


def _resample(
    read: Callable[[Box], Tensor], source: Sequence[int], matrix: np.ndarray, space: Sequence[int]
) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of a volume of size ``space`` by linear interpolation; outside, the nearest voxel.

    ``matrix`` maps voxel indices of it to those of the source.
    """
    same = tuple(source) == tuple(space) and np.allclose(matrix, np.eye(4), rtol=0, atol=_SAME)
    transform = AffineTransform(
        mode="bilinear",
        padding_mode="border",
        normalized=False,
        align_corners=False,
        reverse_indexing=True,
    )
    # Planes of the source that one plane of the result needs; interpolation holds a grid of
    # coordinates, four numbers a voxel.
    grown = max(1.0, float(np.abs(matrix[2, :3]).sum()))
    plane = max(space[0] * space[1] * 4, int(source[0] * source[1] * grown))
    for planes in slabs(plane, space[2]):
        if same:
            yield planes, read((slice(None), slice(None), planes))
            continue
        ends = [(0, space[0] - 1), (0, space[1] - 1), (planes.start, planes.stop - 1)]
        corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
        mapped = matrix[:3, :3] @ corners + matrix[:3, 3:]
        # A voxel more on each side: positions are rounded to float32. Where the box ends, the
        # volume ends or no position comes near, so that its border is the volume's.
        low = np.clip(np.floor(mapped.min(1)) - 1, 0, np.array(source) - 1).astype(int)
        high = np.clip(np.ceil(mapped.max(1)) + 2, low + 1, source).astype(int)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        shifted = matrix.copy()
        shifted[:3, 3] += matrix[:3, 2] * planes.start - low
        size = (*space[:2], planes.stop - planes.start)
        theta = torch.as_tensor(shifted, dtype=torch.float32)
        yield planes, transform(read(box)[None], theta, size)[0]


def load_placed(
    case: Case, preprocessing: Preprocessing, scratch: Scratch
) -> tuple[Sample, Placement]:
    """Read and preprocess the image of a case, in memory of ``scratch``.

    Raises:
        InputError: a file that can't be used.
    """
    volume = read_image(case.images, scratch)
    placement = Placement.of(volume, preprocessing)
    image = place_image(volume, placement, preprocessing, scratch)
    # Its shape stays, its memory is given up.
    volume.array = np.broadcast_to(np.float32(0), volume.array.shape[:3])
    return Sample(case, volume, MetaTensor(image)), placement


def place_image(
    volume: Volume, placement: Placement, preprocessing: Preprocessing, scratch: Scratch
) -> Tensor:
    """What :meth:`Preprocessing.image` gives, [C, *S] float32, in memory of ``scratch``."""
    channels = 1 if volume.array.ndim == 3 else volume.array.shape[3]
    image = as_tensor(scratch.volume(channels, placement.space, np.float32))
    placement.place(volume.array, image, scratch.release)
    planes = list(slabs(image[..., 0].numel(), image.shape[-1]))
    pieces = preprocessing.intensities(volume, lambda: (image[..., p] for p in planes))
    for slab, normalized in pieces:
        slab.copy_(normalized)
        scratch.release()
    return image


def place_maps(volume: Volume, placement: Placement, precision: str, scratch: Scratch) -> Tensor:
    """Residual maps of a file, [K, *S], in memory of ``scratch``."""
    count = volume.array.shape[3]
    maps = as_tensor(scratch.volume(count, placement.space, np.dtype(precision)))
    placement.place(volume.array, maps, scratch.release)
    return maps

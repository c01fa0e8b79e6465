# SPDX-License-Identifier: Apache-2.0
"""NIfTI volumes: read with every check that a wrong file could need, written whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.buffers import Scratch, slabs
from grcsf_kernels.engine.diagnosis import LARGEST
from grcsf_kernels.engine.io.headers import millimeters, open_nifti
from grcsf_kernels.engine.io.sources import readable

SUFFIXES = (".nii.gz", ".nii")
_ROUNDING = 1e-5  # of a label


@dataclass
class Volume:
    """A volume as it is in its file.

    Attributes:
        array: [X, Y, Z] float32, in the file's own orientation; [X, Y, Z, K] for residual maps and
            for images of several channels.
        affine: [4, 4], voxel indices to millimeters, whatever the unit of the file.
        header: the file's header.
        path: the file.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Any
    path: Path


def stem(path: Path) -> str:
    """The name without ``.nii`` or ``.nii.gz``, in small or capital letters."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_volume(path: Path) -> bool:
    """Whether the path is called like a NIfTI file that is not hidden, whatever it is."""
    return path.name.lower().endswith(SUFFIXES) and path.name[0] != "."


def _open(path: Path, axes: int) -> tuple[Any, np.ndarray, tuple[int, ...]]:
    """The image, with its voxels in the file, its affine, and its shape with ``axes`` axes."""
    image, affine = open_nifti(path)
    kind, shape = image.dataobj.dtype, tuple(image.shape)
    if kind.kind not in "iufb":
        raise InputError(path, f"holds values of type {kind}", "expected one number a voxel")
    while len(shape) > axes and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != axes:
        raise InputError(
            path,
            f"has {len(shape)} axes {shape}",
            f"expected {axes} axes: extract the volume that is meant",
        )
    return image, affine, shape


def _memory(path: Path, shape: tuple[int, ...], scratch: Scratch | None) -> np.ndarray:
    """A float32 array of a shape for the voxels of a file."""
    if scratch is not None:
        return scratch.image(shape)
    size, there = 4 * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        raise InputError(
            path,
            f"has {shape} voxels, {size / 1e9:.0f} GB, and this machine has {there / 1e9:.0f} GB",
            "crop or resample it",
        )
    return np.empty(shape, np.float32, order="F")


def _read(
    path: Path,
    axes: int,
    scratch: Scratch | None,
    memory: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> Volume:
    image, affine, shape = _open(path, axes)
    array = _memory(path, shape, scratch) if memory is None else memory(shape)
    bad, rest = 0, (0,) * (len(image.shape) - axes)
    # In the order in which voxels are stored. Whatever their type in the file, beside the array
    # there is never more than a slab.
    for index in np.ndindex(*shape[3:]):
        for planes in slabs(shape[0] * shape[1], shape[2]):
            place = (slice(None), slice(None), planes, *index)
            slab = array[place]
            # What float32 can't hold becomes Inf, which is reported below.
            with readable(path), np.errstate(over="ignore", invalid="ignore"):
                slab[...] = image.dataobj[place + rest]
            bad += int(slab.size - np.isfinite(slab).sum())
            if scratch is not None:
                scratch.release()
    if bad:
        raise InputError(path, f"has {bad} voxels that are NaN or Inf", "replace them, say by 0")
    return Volume(array, affine, image.header, Path(path))


def read_volume(path: Path, scratch: Scratch | None = None) -> Volume:
    """Read a 3D image.

    Args:
        path: the file.
        scratch: gives the memory for the voxels; None: numpy.

    Raises:
        InputError: the file does not exist, is truncated or no NIfTI, is not 3D, or holds NaN or
            Inf.
    """
    return _read(path, 3, scratch)


def read_image(paths: Sequence[Path], scratch: Scratch | None = None) -> Volume:
    """Read the channels of an image, a file each; header and path are those of the first.

    Args:
        paths: the files.
        scratch: gives the memory for the voxels; None: numpy.

    Returns:
        The volume: [X, Y, Z], with more than one channel [X, Y, Z, C].

    Raises:
        InputError: as for :func:`read_volume`; channels of different shapes or affines.
    """
    if len(paths) == 1:
        return read_volume(paths[0], scratch)
    stacked: list[np.ndarray] = []  # the one array of all channels, as soon as its size is known

    def place(channel: int) -> Callable[[tuple[int, ...]], np.ndarray]:
        def memory(shape: tuple[int, ...]) -> np.ndarray:
            if not stacked:
                stacked.append(_memory(paths[channel], (*shape, len(paths)), scratch))
            fits = stacked[0].shape[:3] == shape
            return stacked[0][..., channel] if fits else np.empty(shape, np.float32)

        return memory

    first, *others = (_read(p, 3, scratch, place(channel)) for channel, p in enumerate(paths))
    for other in others:
        _check_space(other.path, other, first)
    first.array = stacked[0]
    return first


def read_geometry(path: Path) -> Volume:
    """Affine and header of a file, without its voxels (the array is empty).

    Raises:
        InputError: no such file, no NIfTI, or a damaged one.
    """
    image, affine = open_nifti(path, whole=False)
    return Volume(np.empty((0, 0, 0), np.float32), affine, image.header, Path(path))


def _check_space(path: Path, found: Volume, image: Volume) -> None:
    if found.array.shape[:3] != image.array.shape[:3]:
        raise InputError(
            path,
            f"has shape {found.array.shape[:3]}, and its image {image.path.name} has "
            f"{image.array.shape[:3]}",
            "resample it to the image",
        )
    difference = np.abs(found.affine - image.affine).max()
    smallest = np.sqrt((image.affine[:3, :3] ** 2).sum(axis=0)).min()
    if difference > min(1e-3, 0.01 * smallest):
        raise InputError(
            path,
            f"has an affine that differs from that of its image {image.path.name} "
            f"(by up to {difference:.3g})",
            "resample it to the image, or copy the image's affine if the voxels are the same",
        )


def read_label(path: Path, image: Volume, lesion_labels: Sequence[int] | None = None) -> Volume:
    """Read the lesion mask of ``image``, 0 and 1.

    Args:
        path: the file.
        image: whose lesions they are.
        lesion_labels: the values that become 1, all others become 0; None: the file holds only 0
            and 1.

    Values that rounding left beside a whole number (1e-5 of it) are that number: files that store
    labels with a scale hold such.

    Raises:
        InputError: as for :func:`read_volume`; labels other than 0 and 1 without
            ``lesion_labels``, or that are no whole numbers; a shape or an affine that differs from
            the image's.
    """
    label = _read(path, 3, None)
    values = np.unique(label.array)
    whole = np.rint(values)
    near = np.abs(values - whole) <= _ROUNDING * np.maximum(1, np.abs(whole))
    if near.all() and (values != whole).any():
        np.rint(label.array, out=label.array)
    usable = near & np.isin(whole, (0, 1)) if lesion_labels is None else near
    if not usable.all():
        shown = values if len(values) <= 6 else values[~usable][:6]
        listed = ", ".join(f"{value:.7g}" for value in shown)
        raise InputError(
            path,
            f"has labels {listed}" + ("" if len(values) <= 6 else " and others"),
            "expected 0 and 1 only: set the lesion to 1, the rest to 0, or name the values that "
            "are lesions in lesion_labels"
            if lesion_labels is None
            else "expected whole numbers: export it without interpolation",
        )
    if lesion_labels is not None:
        label.array = np.isin(label.array, lesion_labels).astype(np.float32)
    _check_space(path, label, image)
    return label


def read_residual(path: Path, image: Volume, scratch: Scratch | None = None) -> Volume:
    """Read the cached residual maps [X, Y, Z, K] of ``image``; ``scratch`` as for an image.

    Raises:
        InputError: as for :func:`read_volume`; a shape or an affine that differs from the image's;
            values far out of the range of residual maps.
    """
    volume = _read(path, 4, scratch)
    _check_space(path, volume, image)
    plane = math.prod(volume.array.shape[:2])
    for index in range(volume.array.shape[3]):
        for planes in slabs(plane, volume.array.shape[2]):
            slab = volume.array[:, :, planes, index]
            low, high = float(slab.min()), float(slab.max())
            if max(-low, high) > LARGEST:
                raise InputError(
                    path,
                    f"holds values from {low:.3g} to {high:.3g}, and residual maps are in [0, 1]",
                    "run grcsf residuals again",
                )
        if scratch is not None:
            scratch.release()
    return volume


def read_description(path: Path) -> str | None:
    """The description in the header of a file that is there and whole, else None."""
    try:
        image, _ = open_nifti(path)
    except InputError:
        return None
    return image.header["descrip"].item().decode("latin-1")


def write_volume(
    path: Path, array: np.ndarray, like: Volume, description: str | None = None
) -> Path:
    """Write ``array`` in the space of ``like``: affine, orientation codes and units are kept.

    Args:
        path: the file, written whole.
        array: [X, Y, Z] or [X, Y, Z, K] in the orientation of ``like``; uint8 or float32.
        like: the volume whose header is taken.
        description: at most 79 characters for the header; None: that of ``like``.

    Returns:
        ``path``.

    Raises:
        OSError: the file can't be written; ``filename`` is the path.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    if description is not None:
        header["descrip"] = description
    kind = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    affine = like.affine.copy()
    affine[:3] /= millimeters(like.header)  # back to the unit of the file
    image = kind(array, affine, header)
    try:
        return write_whole(path, lambda temporary: nib.save(image, temporary))
    except OSError as error:
        # Writing, unlike opening, does not say to which file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error

# SPDX-License-Identifier: Apache-2.0
"""NIfTI volumes: read with every check that a wrong file could need, written whole."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.files import write_whole

SUFFIXES = (".nii.gz", ".nii")


@dataclass
class Volume:
    """A volume as it is in its file.

    Attributes:
        array: [X, Y, Z] float32, in the file's own orientation; [X, Y, Z, K] for residual maps and
            for images of several channels.
        affine: [4, 4], voxel indices to millimeters.
        header: the file's header.
        path: the file.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Any
    path: Path


def stem(path: Path) -> str:
    """The name without ``.nii`` or ``.nii.gz``."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_volume(path: Path) -> bool:
    """Whether the path looks like a NIfTI file that is not hidden."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _check_stream(path: Path) -> None:
    """Read a compressed file to its end, where its checksum is: nibabel stops before it."""
    if path.name.endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(1 << 22):
                pass


def _read(path: Path, axes: int) -> Volume:
    if not Path(path).is_file():
        raise InputError(path, "does not exist", "check the path")
    try:
        _check_stream(Path(path))
        image: Any = nib.load(path)
        kind = image.get_data_dtype()
        if kind.kind not in "iufb":
            raise InputError(path, f"holds values of type {kind}", "expected one number a voxel")
        array = np.asarray(image.dataobj, dtype=np.float32)
    except (ImageFileError, EOFError, OSError, zlib.error, ValueError, TypeError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            path,
            f"can't be read, it is truncated or no NIfTI ({problem[:120]})",
            "copy or export it again",
        ) from error
    while array.ndim > axes and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != axes:
        raise InputError(
            path,
            f"has {array.ndim} axes {array.shape}",
            f"expected {axes} axes: extract the volume that is meant",
        )
    if 0 in array.shape:
        raise InputError(path, f"is empty, shape {array.shape}", "export it again")
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(
            path, "has an affine that is singular or not finite", "export it again with a geometry"
        )
    bad = int(np.size(array) - np.isfinite(array).sum())
    if bad:
        raise InputError(path, f"has {bad} voxels that are NaN or Inf", "replace them, say by 0")
    return Volume(array, affine, image.header, Path(path))


def read_volume(path: Path) -> Volume:
    """Read a 3D image.

    Raises:
        InputError: the file does not exist, is truncated or no NIfTI, is not 3D, or holds NaN or
            Inf.
    """
    return _read(path, 3)


def read_image(paths: Sequence[Path]) -> Volume:
    """Read the channels of an image, a file each; header and path are those of the first.

    Returns:
        The volume: [X, Y, Z], with more than one channel [X, Y, Z, C].

    Raises:
        InputError: as for :func:`read_volume`; channels of different shapes or affines.
    """
    first, *others = (read_volume(path) for path in paths)
    for other in others:
        _check_space(other.path, other, first)
    if others:
        first.array = np.stack([volume.array for volume in (first, *others)], axis=-1)
    return first


def read_geometry(path: Path) -> Volume:
    """Affine and header of a file, without its voxels (the array is empty).

    Raises:
        InputError: no such file, or no NIfTI.
    """
    try:
        image: Any = nib.load(path)
    except (ImageFileError, EOFError, OSError, zlib.error) as error:
        raise InputError(path, "can't be read", "copy or export it again") from error
    return Volume(np.empty((0, 0, 0), np.float32), image.affine, image.header, Path(path))


def _check_space(path: Path, found: Volume, image: Volume) -> None:
    if found.array.shape[:3] != image.array.shape[:3]:
        raise InputError(
            path,
            f"has shape {found.array.shape[:3]}, and its image {image.path.name} has "
            f"{image.array.shape[:3]}",
            "resample it to the image",
        )
    difference = np.abs(found.affine - image.affine).max()
    if difference > 1e-3:
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

    Raises:
        InputError: as for :func:`read_volume`; labels other than 0 and 1 without
            ``lesion_labels``, or that are no whole numbers; a shape or an affine that differs from
            the image's.
    """
    label = _read(path, 3)
    values = np.unique(label.array)
    usable = np.isin(values, (0, 1)) if lesion_labels is None else values == np.rint(values)
    if not usable.all():
        shown = ", ".join(f"{value:g}" for value in values[:6])
        raise InputError(
            path,
            f"has labels {shown}",
            "expected 0 and 1 only: set the lesion to 1, the rest to 0, or name the values that "
            "are lesions in lesion_labels",
        )
    if lesion_labels is not None:
        label.array = np.isin(label.array, lesion_labels).astype(np.float32)
    _check_space(path, label, image)
    return label


def read_residual(path: Path, image: Volume) -> Volume:
    """Read the cached residual maps [X, Y, Z, K] of ``image``.

    Raises:
        InputError: as for :func:`read_label`.
    """
    volume = _read(path, 4)
    _check_space(path, volume, image)
    return volume


def write_volume(path: Path, array: np.ndarray, like: Volume) -> Path:
    """Write ``array`` in the space of ``like``: affine, orientation codes and units are kept.

    Args:
        path: the file, written whole.
        array: [X, Y, Z] or [X, Y, Z, K] in the orientation of ``like``; uint8 or float32.
        like: the volume whose header is taken.

    Returns:
        ``path``.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    kind = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array, like.affine, header)
    return write_whole(path, lambda temporary: nib.save(image, temporary))

# SPDX-License-Identifier: Apache-2.0
"""Headers of NIfTI files, compared with the file before anything believes them.

A damaged header may claim any size, type and place of its voxels. Nothing here takes more memory
than a header and a block of the file, whatever is claimed.

Source: NIfTI-1 and NIfTI-2, https://nifti.nimh.nih.gov; the rule for quaternions that rounding
makes too long is that of their reference implementation (nifti_quatern_to_mat44).
"""

from __future__ import annotations

import gzip
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.io.sources import check_file, readable

_AGAIN = "copy or export it again"
_BLOCK = 1 << 22
_MOST_PACKED = 1100  # deflate makes at most 1032 bytes of one
_PADDING = 4096  # bytes behind the voxels that programs may leave
_LONGEST_EXTENSION = 1 << 26
_KINDS = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
_MAGIC = {348: b"n+1", 540: b"n+2"}
_MILLIMETERS = {1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of the unit; others are not known
_POINTERS = {
    b"version https://git-lfs": "git lfs pull",
    b"/annex/objects": "datalad get",
    b"../.git/annex": "datalad get",
}

# What nibabel corrects in a header, or finds wrong with it, is not said twice.
_QUIET = logging.Logger("nibabel", logging.CRITICAL + 1)


def millimeters(header: Any) -> float:
    """Millimeters in a unit of the header's affine; 1 where it does not say which unit that is."""
    return _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)


def open_nifti(path: Path, *, whole: bool = True) -> tuple[Any, np.ndarray]:
    """An image with its voxels still in the file, and its affine in millimeters.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        whole: read a compressed file to its end, where its checksum is; False: only its header.

    Returns:
        The image of nibabel, without an affine, and the affine [4, 4].

    Raises:
        InputError: there is no such file, it is truncated, damaged or no NIfTI, or its header
            promises what the file does not hold.
    """
    path = Path(path)
    check_file(path)
    with readable(path), _content(path) as (stream, most):
        header, sizes = _header(path, stream, most, whole)
        # Compressed files are read on from slab to slab, not from the start each time.
        voxels = ArrayProxy(os.fspath(path), header.copy(), keep_file_open=True)
        affine = _affine(path, header, sizes)
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        return kind(voxels, None, header), affine


@contextmanager
def _content(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The content, unpacked if it is packed, and the bytes that it can have at most."""
    with open(path, "rb") as file:
        start = file.read(64)
        file.seek(0)
        for mark, command in _POINTERS.items():
            if start.startswith(mark):
                raise InputError(path, "stands for a file that is not here", f"fetch it: {command}")
        packed, named = start[:2] == b"\x1f\x8b", path.name.lower().endswith(".gz")
        if packed and not named:
            raise InputError(path, "is compressed by gzip", f"call it {path.name}.gz")
        if named and not packed and _size_of_header(start)[0]:
            raise InputError(path, "is not compressed", f"call it {path.name[:-3]}")
        size = os.fstat(file.fileno()).st_size
        if not named:
            yield file, size
            return
        with gzip.open(file) as unpacked:
            yield unpacked, size * _MOST_PACKED  # type: ignore[misc]


def _size_of_header(start: bytes) -> tuple[int, str]:
    """Length and byte order that the first bytes of a NIfTI file say; 0 of anything else."""
    for order, name in (("<", "little"), (">", "big")):
        size = int.from_bytes(start[:4], name)  # type: ignore[arg-type]
        if size in _KINDS and len(start) >= 4:
            return size, order
    return 0, ""


def _header(path: Path, stream: BinaryIO, most: int, whole: bool) -> tuple[Any, np.ndarray]:
    """The header, when all that it says of the file is true, and its voxel sizes as they are."""
    start = stream.read(4)
    size, order = _size_of_header(start)
    block = start + (stream.read(size - 4) if size else b"")
    if not size:
        raise InputError(
            path, "can't be read, it is truncated or no NIfTI (no such header)", "export it as one"
        )
    if len(block) < size:
        raise InputError(path, "is truncated within its header", _AGAIN)
    kind = _KINDS[size].header_class
    raw = kind(block, order, check=False)
    if raw["magic"].item()[:3] != _MAGIC[size]:
        raise InputError(
            path,
            f"has the mark {raw['magic'].item()[:3]!r} in its header",
            f"expected {_MAGIC[size].decode()}: export it as a single NIfTI file",
        )
    count = _voxels(path, raw)
    offset = _offset(path, raw)
    header = raw.copy()
    header.check_fix(_QUIET)
    need = offset + count * header.get_data_dtype().itemsize
    if need > most:
        raise InputError(
            path,
            f"is truncated or its header is damaged: it promises {need} bytes, and there are at "
            f"most {most}",
            _AGAIN,
        )
    header.extensions = _extensions(path, stream, offset - size, kind, header)
    if whole:
        _compare(path, stream, need)
    for name in ("sform_code", "qform_code"):
        # nibabel takes a code that does not exist for 0, and so another geometry.
        if header[name] != raw[name]:
            raise _no_geometry(path, f"has the {name} {int(raw[name])}")
    return header, raw["pixdim"][1:4]


def _voxels(path: Path, raw: Any) -> int:
    """How many there are, by a header that was not corrected."""
    axes = int(raw["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(path, f"has {axes} axes by its header", f"it is damaged: {_AGAIN}")
    shape = [int(n) for n in raw["dim"][1 : axes + 1]]
    if min(shape) < 1:
        raise InputError(
            path, f"is empty, shape {tuple(shape)} by its header", f"it is damaged: {_AGAIN}"
        )
    slope = float(raw["scl_slope"])
    if np.isinf(slope):
        raise InputError(path, f"has a scale (scl_slope) of {slope}", f"it is damaged: {_AGAIN}")
    return int(np.prod(shape, dtype=object))


def _offset(path: Path, raw: Any) -> int:
    """Where its voxels begin, behind the header and the four bytes that follow it."""
    offset = float(raw["vox_offset"])
    if not (np.isfinite(offset) and offset >= raw.sizeof_hdr + 4 and offset == int(offset)):
        raise InputError(
            path, f"has its voxels at byte {offset:g} by its header", f"it is damaged: {_AGAIN}"
        )
    return int(offset)


def _extensions(path: Path, stream: BinaryIO, size: int, kind: Any, header: Any) -> Any:
    """Extensions of the header, from the ``size`` bytes between it and the voxels."""
    flag = stream.read(min(4, max(size, 0)))
    size -= len(flag)
    if size <= 0 or flag[:1] in (b"", b"\0"):
        _skip(stream, size)
        return kind.exts_klass()
    if size > _LONGEST_EXTENSION:
        raise InputError(path, f"has header extensions of {size} bytes", "remove them")
    content = stream.read(size)
    # nibabel takes the length of each from the file, and a negative one for all that is left.
    swapped = header.endianness != nib.volumeutils.native_code
    order, place = ("<" if (nib.volumeutils.native_code == "<") != swapped else ">"), 0
    while size - place >= 16:
        length = int(np.frombuffer(content, f"{order}i4", 1, place)[0]) if content[place:] else 0
        if not 8 <= length <= len(content) - place:
            raise InputError(
                path, f"has a header extension of {length} bytes", "remove the extension"
            )
        place += length
    return kind.exts_klass.from_fileobj(io.BytesIO(content), size, swapped)


def _skip(stream: BinaryIO, size: int) -> None:
    while size > 0 and (block := stream.read(min(size, _BLOCK))):
        size -= len(block)


def _compare(path: Path, stream: BinaryIO, need: int) -> None:
    """InputError where the content is shorter or longer than its header says."""
    if isinstance(stream, gzip.GzipFile):
        # To its end, where its checksum is: nibabel stops before it.
        length = stream.tell()
        while length <= need + _PADDING and (block := stream.read(_BLOCK)):
            length += len(block)
    else:
        length = os.fstat(stream.fileno()).st_size
    if length < need:
        raise InputError(
            path,
            f"is truncated or its header is damaged: it promises {need} bytes, and there are "
            f"{length}",
            _AGAIN,
        )
    if length > need + _PADDING:
        raise InputError(
            path,
            f"is longer than its header says, {need} bytes",
            f"the header or the file is damaged: {_AGAIN}",
        )


def _affine(path: Path, header: Any, sizes: np.ndarray) -> np.ndarray:
    """The affine in millimeters; a quaternion that rounding made too long is corrected."""
    if header["sform_code"] == 0:
        if not (np.isfinite(sizes).all() and (sizes != 0).all()):
            shown = ", ".join(f"{size:g}" for size in sizes)
            raise _no_geometry(path, f"has voxel sizes {shown}")
        if header["qform_code"] != 0:
            _correct_quaternion(path, header)
    affine = np.asarray(header.get_best_affine(), np.float64)
    scale = millimeters(header)
    if scale != 1:
        affine = affine.copy()
        affine[:3] *= scale
    if not np.isfinite(affine).all():
        raise _no_geometry(path, "has an affine that is singular or not finite")
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    volume = abs(np.linalg.det(affine[:3, :3]))
    if not (lengths > 0).all() or volume < 1e-6 * float(np.prod(lengths)):
        raise _no_geometry(path, "has an affine that is singular or not finite")
    if lengths.min() < 1e-6 or lengths.max() > 1e4 or np.abs(affine[:3, 3]).max() > 1e7:
        shown = " x ".join(f"{length:.3g}" for length in lengths)
        place = ", ".join(f"{x:.3g}" for x in affine[:3, 3])
        raise _no_geometry(path, f"has voxels of {shown} mm at {place} mm")
    return affine


def _no_geometry(path: Path, problem: str) -> InputError:
    return InputError(path, problem, "export it again with a geometry")


def _correct_quaternion(path: Path, header: Any) -> None:
    """Scale a quaternion to length 1 where the rounding of its parts made it longer."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    parts = np.array([float(header[name]) for name in names])
    square = float(parts @ parts)
    if not np.isfinite(square) or square > 1.001:
        raise _no_geometry(path, f"has a quaternion of length {square**0.5:.4g}, expected 1")
    try:
        header.get_qform_quaternion()
    except ValueError:
        for name, part in zip(names, parts / square**0.5, strict=True):
            header[name] = part

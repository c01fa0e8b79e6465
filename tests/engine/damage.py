# SPDX-License-Identifier: Apache-2.0
"""Damaged NIfTI files: fields of the header that are overwritten, bytes that are missing."""

from __future__ import annotations

import gzip
import os
import struct

# Place and type of the fields of a NIfTI-1 header.
FIELDS = {
    "sizeof_hdr": (0, "i"),
    "ndim": (40, "h"),
    "dim1": (42, "h"),
    "dim2": (44, "h"),
    "dim3": (46, "h"),
    "datatype": (70, "h"),
    "pixdim1": (80, "f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern_b": (256, "f"),
    "quatern_c": (260, "f"),
    "quatern_d": (264, "f"),
    "srow_x0": (280, "f"),
    "srow_x3": (292, "f"),
    "magic": (344, "4s"),
    "extension": (348, "4s"),
}


def content_of(path):
    """The unpacked bytes of a file."""
    packed = path.read_bytes()
    return gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed


def write_content(path, content):
    """Write bytes, packed where the name says so."""
    packed = path.name.lower().endswith(".gz")
    path.write_bytes(gzip.compress(bytes(content), 1, mtime=0) if packed else bytes(content))
    return path


def change(path, **fields):
    """Overwrite fields of a header."""
    content = bytearray(content_of(path))
    for name, value in fields.items():
        place, kind = FIELDS[name]
        struct.pack_into(f"<{kind}", content, place, value)
    return write_content(path, content)


def shorten(path, count):
    """Take the last bytes off a file as it is on the disk."""
    os.truncate(path, path.stat().st_size - count)
    return path


nan, inf = float("nan"), float("inf")
BIG = {"dim1": 32767, "dim2": 32767, "dim3": 32767}

# Each with what the message has to say.
HEADERS = {
    "a type that does not exist": ({"datatype": 9999}, "9999"),
    "a negative size": ({"dim1": -1}, "is empty, shape"),
    "a size of nothing": ({"dim2": 0}, "is empty, shape"),
    "sizes beyond the file": (BIG, "promises"),
    "voxels at infinity": ({"vox_offset": inf}, "at byte inf"),
    "voxels at nan": ({"vox_offset": nan}, "at byte nan"),
    "voxels before the file": ({"vox_offset": -16.0}, "at byte -16"),
    "voxels within the header": ({"vox_offset": 0.0}, "at byte 0"),
    "voxels behind the file": ({"vox_offset": 1e9}, "promises"),
    "an offset of values that is nan": ({"scl_slope": 1.0, "scl_inter": nan}, "inter"),
    "an offset of values that is infinite": ({"scl_slope": 1.0, "scl_inter": inf}, "inter"),
    "an infinite scale": ({"scl_slope": inf}, "scl_slope"),
    "voxels of 1e30 mm": ({"srow_x0": 1e30}, "voxels of 1e+30"),
    "a place beyond the earth": ({"srow_x3": 1e30}, "at 1e+30"),
    "a place that is nan": ({"srow_x3": nan}, "singular or not finite"),
    "a code of geometry that does not exist": ({"sform_code": 900}, "sform_code 900"),
    "no axes": ({"ndim": 0}, "0 axes"),
    "eight axes": ({"ndim": 8}, "8 axes"),
    "another mark": ({"magic": b"abc\0"}, "abc"),
    "a mark of two files": ({"magic": b"ni1\0"}, "ni1"),
    "another length of header": ({"sizeof_hdr": 349}, "no NIfTI"),
    "a quaternion that is no rotation": (
        {"sform_code": 0, "qform_code": 1, "quatern_b": 0.9, "quatern_c": 0.9},
        "quaternion",
    ),
    "voxel sizes of nan": ({"sform_code": 0, "qform_code": 0, "pixdim1": nan}, "voxel sizes nan"),
}

# SPDX-License-Identifier: Apache-2.0
"""Checksums of tensors and of files: a bit that changed on a disk is noticed and named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# The comment at the end of a zip archive, which every reader of archives passes over.
_SEAL = re.compile(rb"grcsf sha256 ([0-9a-f]{64})")
_LENGTH = len(b"grcsf sha256 ") + 64
_END = 22  # bytes of the record at the end of an archive, the last two the length of the comment


def tensors_digest(named: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """SHA-256 in hex of the names, shapes, types and bytes of tensors on the CPU, and of a text.

    Args:
        named: tensors by name; their order does not matter.
        text: what is to be kept with them.
    """
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def seal(path: Path) -> None:
    """Append the digest of an archive of :func:`torch.save` to it, as its comment.

    Raises:
        OSError: it can't be written, or is no archive.
    """
    with open(path, "r+b") as file:
        file.seek(-_END, 2)
        end = file.read(_END)
        if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
            raise OSError(f"{path} is no archive of torch.save")
        file.seek(-2, 2)
        file.write(_LENGTH.to_bytes(2, "little"))
        digest = _digest(file, file.tell())
        file.seek(0, 2)
        file.write(f"grcsf sha256 {digest}".encode())


def is_sealed(path: Path) -> bool | None:
    """Whether the bytes of an archive are those that were sealed; None: there is no seal.

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < _LENGTH:
            return None
        file.seek(size - _LENGTH)
        found = _SEAL.fullmatch(file.read(_LENGTH))
        if found is None:
            return None
        return _digest(file, size - _LENGTH).encode() == found[1]


def _digest(file: BinaryIO, size: int) -> str:
    """Of the first bytes of a file."""
    found = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        found.update(block)
        size -= len(block)
    return found.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Volume buffers in RAM or in anonymous memory-mapped files."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

# Voxels that a step over a volume handles at once: 64 MB in float32.
_SLAB = 1 << 24


class NoRoomError(OSError):
    """The volumes of one case do not fit the disk; others may."""


class Scratch:
    """Hands out volumes for one run.

    A volume on disk is a file without a name in ``folder``: it is gone when nothing uses it, also
    after the process was killed. Its space is claimed when it is made, so that a full disk is an
    error then and not a crash later.

    Args:
        folder: for the files; made if it is missing.
        where: ``"cpu"`` or ``"device"``: in memory; ``"disk"``: in files; ``"auto"``: in memory
            while all volumes that are alive stay within ``limit``, then in files. On the device
            are only the results of windows (:meth:`results`).
        limit: bytes, for ``"auto"``.
    """

    def __init__(self, folder: Path, where: str, limit: float) -> None:
        self.folder, self.where = Path(folder), where
        self._left = limit
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def volume(self, channels: int, space: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
        """An array [C, X, Y, Z], not initialized; X is the fastest axis in memory, as in NIfTI.

        Raises:
            NoRoomError: the disk has no room for it.
            MemoryError: there is not as much memory.
            OSError: the folder can't be written.
        """
        shape = (channels, *reversed(space))
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        on_disk = self.where == "disk" or (self.where == "auto" and size > self._left)
        if on_disk and size:
            array = np.frombuffer(self._map(size), dtype).reshape(shape)
        else:
            array = np.empty(shape, dtype)
            self._left -= size
            weakref.finalize(array, self._give_back, size)
        return array.transpose(0, 3, 2, 1)

    def image(self, shape: Sequence[int]) -> np.ndarray:
        """An array [X, Y, Z] or [X, Y, Z, K], float32, not initialized."""
        array = self.volume(int(np.prod(shape[3:])), shape[:3], np.float32)
        return array[0] if len(shape) == 3 else np.moveaxis(array, 0, -1)

    def results(
        self, channels: int, space: Sequence[int], precision: str, device: torch.device
    ) -> torch.Tensor:
        """A tensor [C, X, Y, Z] for what windows give, ``"float32"`` or ``"float16"``."""
        if self.where == "device":
            dtype = getattr(torch, precision)
            return torch.empty((channels, *space), dtype=dtype, device=device)
        return as_tensor(self.volume(channels, space, np.dtype(precision)))

    def sums_on(self, device: torch.device) -> torch.device:
        """Where the sums of windows that overlap belong."""
        return torch.device("cpu") if self.where in ("cpu", "disk") else device

    def _give_back(self, size: int) -> None:
        self._left += size

    def _map(self, size: int) -> mmap.mmap:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                reason = f"{error.strerror} for {size / 1e9:.1f} GB of scratch volumes"
                raise NoRoomError(error.errno, reason, str(self.folder)) from error
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        return mapped

    def release(self) -> None:
        """Stop counting pages of files as memory of this process; what is in them stays."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def slabs(plane: int, depth: int) -> Iterator[slice]:
    """Slices of an axis of ``depth`` planes with ``plane`` voxels each, of bounded size."""
    step = max(1, _SLAB // max(plane, 1))
    for start in range(0, depth, step):
        yield slice(start, min(start + step, depth))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The tensor that shares the memory of a volume of :class:`Scratch`."""
    return torch.from_numpy(array)

# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all.

A file is written in a hidden folder of its own beside it, which has a random name and which nobody
else can enter, and renamed at the end. So no other process, container or link can have its name,
its length does not depend on the file's, and a lock in there tells what is being written from what
a process left that was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.common.locks import lock, machine, unlock

_PREFIX, _SUFFIX, _LOCK = ".grcsf-", ".tmp", "lock"
# What another machine left is told from what it still writes by its age, in seconds.
_ABANDONED = 24 * 3600.0


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file elsewhere in the same folder, and rename it when it is whole and on the disk.

    What processes that were killed have left in the folder is removed first. A link of the file's
    name is replaced by the file; what it points to stays as it is.

    Args:
        path: the file; its folder is made.
        write: called with the temporary path, which has the same suffixes.

    Returns:
        ``path``.

    Raises:
        OSError: it can't be written; the former file is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # a name that is too long is an error now, not when everything is computed
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(21, "is a folder, and a file is to be written", str(path))
    remove_leftovers(path)
    try:
        with _workplace(path.parent) as (folder, mode):
            temporary = folder / f"new{_suffixes(path)}"
            write(temporary)
            _flush(temporary)
            # Some writers make files that only their owner may read.
            os.chmod(temporary, mode)
            os.replace(temporary, path)
            with contextlib.suppress(OSError):  # some network folders can't
                _flush(path.parent)
    except OSError as error:
        # The user knows the file, not the temporary one.
        if error.filename is not None and _PREFIX in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise
    return path


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around the writing of ``path``, which is written whole.

    Raises:
        InputError: it can't be written; the former file is still there.
    """
    try:
        yield
    except _failures() as error:
        problem = one_line(error, 200)
        remedy = "see to the disk's space and the permissions; the former file is kept"
        raise InputError(path, f"can't be written ({problem})", remedy) from error


def _failures() -> tuple[type[Exception], ...]:
    """What a full disk becomes: of the system, of torch, and of safetensors where it is there."""
    found = sys.modules.get("safetensors")
    return (OSError, RuntimeError, *([found.SafetensorError] if found is not None else []))


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have half written in a folder, and nothing that lives.

    Args:
        path: the folder, or a file in it.
    """
    folder = path if path.is_dir() else path.parent
    try:
        with os.scandir(folder) as entries:
            found = [
                Path(entry)
                for entry in entries
                if entry.name.startswith(_PREFIX)
                and entry.name.endswith(_SUFFIX)
                and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return
    for leftover in found:
        _remove_if_dead(leftover)


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder in ``folder`` for this process alone, and the mode that new files get."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder))
        descriptor = None
        try:
            # Who removes leftovers may look at it between these two lines, and even take it away.
            with contextlib.suppress(FileNotFoundError):
                descriptor = lock(place / _LOCK, wait=True)
            if descriptor is None:
                continue
            # The system applies the user's umask to new files; asking for it would change it for
            # all threads for a moment.
            mode = os.fstat(descriptor).st_mode & 0o777
            os.write(descriptor, machine().encode())
            yield place, mode
            return
        finally:
            if descriptor is not None:
                unlock(descriptor)
            shutil.rmtree(place, ignore_errors=True)


def _remove_if_dead(place: Path) -> None:
    try:
        descriptor = lock(place / _LOCK, wait=False)
    except OSError:  # gone by now, or of another user
        return
    if descriptor is None:
        return
    try:
        here = os.read(descriptor, 100).decode(errors="replace") == machine()
        # The lock of another machine may not reach this one, and one without a text was just made.
        if here or time.time() - os.fstat(descriptor).st_mtime > _ABANDONED:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        unlock(descriptor)
    if here:
        with contextlib.suppress(OSError):  # network folders keep the lock until it is closed
            place.rmdir()


def _suffixes(path: Path) -> str:
    """``.nii.gz`` or ``.png``: writers choose the format by it."""
    suffix = path.suffix if len(path.suffix) < 20 else ""
    if suffix.lower() == ".gz":
        suffix = path.with_suffix("").suffix[-20:] + suffix
    return suffix


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

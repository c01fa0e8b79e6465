# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import escape
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Write ``path`` through a temporary file in the same folder that is renamed at the end.

    Args:
        path: the file; its folder is made.
        write: called with the temporary path, which has the same suffixes.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that nothing that lists volumes takes it for one; with the suffixes, because
    # writers choose the format by them. remove_leftovers() knows the name.
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        write(temporary)
        # Some writers make files that only their owner may read.
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_leftovers(path: Path) -> None:
    """Remove what is half written of ``path`` by processes that were killed meanwhile."""
    for leftover in path.parent.glob(f".*.tmp.{escape(path.name)}"):
        leftover.unlink(missing_ok=True)

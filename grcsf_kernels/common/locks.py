# SPDX-License-Identifier: Apache-2.0
"""Locks on files that the system takes back when their process ends, however it ends.

They hold between the processes and containers of one machine, and between machines where the shared
folder passes ``flock`` on (NFS 4 does, Lustre with ``-o flock``). Elsewhere they are no protection.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from grcsf_kernels.common.errors import InputError

_held: set[int] = set()


def _let_go() -> None:
    """In a process that was forked, such as a worker of the loader: the lock is its parent's."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def machine() -> str:
    """The same for all containers of one running system; another one after it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def lock(path: Path, *, wait: bool) -> int | None:
    """Open and lock a file, which is made where it is missing; never one behind a link.

    Args:
        path: the file.
        wait: for the process that has it; otherwise None is returned.

    Returns:
        The descriptor, for :func:`unlock`; None where another process has the lock, and where the
        other one removed the file meanwhile.

    Raises:
        OSError: it can't be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        unlock(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    try:
        ours = os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        ours = False
    if not ours:
        unlock(descriptor)
        return None
    return descriptor


def unlock(descriptor: int) -> None:
    """Close what :func:`lock` gave."""
    _held.discard(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside, no other process can enter this for the same folder, which is made.

    Raises:
        InputError: another process is inside; the message says which.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".grcsf-run.lock"
    descriptor = None
    for _ in range(10):  # a run that ends just now takes the file with it
        if (descriptor := lock(path, wait=False)) is not None:
            break
        try:
            other = path.read_text(errors="replace").strip()
        except OSError:
            continue
        if other:
            break
    if descriptor is None:
        raise InputError(
            folder,
            f"another run writes there ({other or 'it does not say which'})",
            "wait for it or stop it, or give each run an output folder of its own",
        )
    try:
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}, since {since}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        unlock(descriptor)

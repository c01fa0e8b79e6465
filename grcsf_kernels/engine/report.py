# SPDX-License-Identifier: Apache-2.0
"""What a run over many files did, and which files it could not use."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from grcsf_kernels.common.errors import InputError, printable, show_traceback
from grcsf_kernels.engine.buffers import NoRoomError

Item = TypeVar("Item")

console = Console(stderr=True)


def warn(text: str) -> None:
    """Say what the user should know of; the run goes on."""
    # No markup: a path may hold brackets.
    console.print(printable(text), style="yellow", highlight=False, markup=False, soft_wrap=True)


@dataclass
class Report:
    """Files that were written, and inputs that were skipped with the reason.

    Attributes:
        done: paths of what was written.
        failed: pairs of input and reason.
    """

    done: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        """Note an input that can't be used, and say so."""
        self.failed.append((path, printable(reason)))
        warn(f"skipped: {reason}")


def for_each(
    items: Iterable[Item], work: Callable[[Item], Path | None], report: Report, title: str
) -> None:
    """Call ``work`` for every item with a progress bar; what goes wrong with one stops no other.

    A disk without room for what is written is the exception: each further item would fail as well.
    Where only the scratch volumes of one case are too large, the others may fit.

    Raises:
        OSError: the disk is full, or the user's share of it.
    """
    items = list(items)
    for item in track(items, title, console=console, disable=not items):
        try:
            written = work(item)
        except InputError as error:
            report.skip(Path(str(error.where)), str(error))
        except Exception as error:
            where = getattr(item, "image", item)
            problem = " ".join(str(error).split())
            if isinstance(error, NoRoomError):
                needed = f"{error.strerror} in {error.filename}"
                remedy = "free space there, or set accumulate and memory_gb"
                report.skip(Path(str(where)), f"{where}: {needed}; {remedy}")
                continue
            if isinstance(error, OSError):
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if error.strerror and error.filename:
                    problem = f"{error.strerror}: {error.filename}"
                remedy = "check the path and the permissions"
                report.skip(Path(str(where)), f"{where}: failed, {problem}; {remedy}")
                continue
            # No mistake of the user that has a message of its own: GRCSF_TRACEBACK=1 says where.
            show_traceback(error)
            report.skip(Path(str(where)), f"{where}: failed ({type(error).__name__}: {problem})")
        else:
            if written is not None:
                report.done.append(written)

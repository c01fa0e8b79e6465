# SPDX-License-Identifier: Apache-2.0
"""The one guard around commands: whatever one raises is a line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from grcsf_kernels.common.errors import TRACEBACK, InputError, one_line, printable
from grcsf_kernels.engine.diagnosis import is_out_of_memory


class Terminated(KeyboardInterrupt):
    """SIGTERM: a run is stopped as with Ctrl-C, so that it leaves the same behind."""


def handle_sigterm() -> None:
    """Let SIGTERM stop this process as Ctrl-C does. Only for a process of our own."""
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            raise Terminated
        # A fork, such as a worker that makes crops: it has nothing to say.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)


def explain(error: BaseException, doing: str, output: object = None) -> tuple[str, int]:
    """What to say of an exception that ended a command, and the exit status.

    Args:
        error: the exception.
        doing: what was being done, such as ``"grcsf train"``.
        output: what is written, for errors that name no file.

    Returns:
        One line, empty where there is nothing to say, and 1, or 128 and the signal's number.
    """
    problem = f"{type(error).__name__}: {one_line(error, 300)}".rstrip(": ")
    if isinstance(error, KeyboardInterrupt):
        stopped = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return (
            "interrupted: finished cases are kept; run the same command again to resume",
            128 + stopped,
        )
    if isinstance(error, BrokenPipeError):  # whoever read the output has gone
        return "", 128 + signal.SIGPIPE
    if isinstance(error, InputError):
        line = str(error)
    elif is_out_of_memory(error):
        line = (
            f"{doing}: memory ran out ({problem}); lower batch_size or crop_size, or the sizes of "
            "the network, or use a machine with more memory"
        )
    elif isinstance(error, OSError):
        # A full disk, a folder without permission, a file where a folder is meant.
        where = doing if error.filename is None and output is None else error.filename or output
        line = f"{where}: {error.strerror or error}; check the path, the disk's space and the "
        line += "permissions"
    else:
        line = f"{doing}: {problem}{_place(error)}; {fault_remedy()}"
    rank = os.environ.get("RANK", "0")
    # Under torchrun the first process reports, the others say which they are.
    label = "error" if rank == "0" else f"error in process {rank}"
    return f"{label}: {printable(line)}", 1


def fault_remedy() -> str:
    """What to do about an exception that no mistake of the user explains."""
    return (
        "this is a fault of grcsf_kernels: report it with the traceback, which "
        f"{TRACEBACK}=1 shows, and the output of grcsf doctor"
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" (in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def say(line: str) -> None:
    """A line on the standard error, if there is anyone to read it."""
    if line and sys.stderr is not None:
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except OSError:
            discard_output()


def discard_output() -> None:
    """Nobody reads what is still to be written: no complaint when Python closes the streams."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError, AttributeError):  # not one of the system's streams
            continue

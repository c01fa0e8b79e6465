# SPDX-License-Identifier: Apache-2.0
"""Files of users: what hinders reading them, and text that is checked."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grcsf_kernels.common.errors import InputError, one_line

_LONGEST_TEXT = 1 << 26  # bytes; lists of a million paths are shorter


def obstacle(path: Path) -> tuple[str, str] | None:
    """Why a path can't be read as a file: problem and remedy; None: nothing speaks against it."""
    try:
        status = os.stat(path)
    except OSError as error:
        return _absence(path, error)
    except ValueError:  # a null character
        return "is no path", "check the path"
    if stat.S_ISDIR(status.st_mode):
        return "is a folder", "expected a file: check the path"
    if not stat.S_ISREG(status.st_mode):
        return "is a pipe or a device", "expected a file: copy the content into one"
    if not os.access(path, os.R_OK):
        return "can't be read (permission denied)", "check its permissions"
    if not status.st_size:
        return "is empty", "copy or export it again"
    return None


def _absence(path: Path, error: OSError) -> tuple[str, str]:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):
        target = os.readlink(path)
        if "annex/objects" in target:
            return (
                "is a link whose content is not here",
                "fetch it (datalad get, git annex get), or remove the link",
            )
        return f"is a link to {target}, which is not there", "correct the link, or remove it"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "does not exist", "check the path"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "can't be read (permission denied)", "check the permissions of its folders"
    return f"can't be read ({error.strerror or error})", "check the path"


def check_file(path: Path) -> None:
    """InputError where a path can't be read as a file: missing, a broken link, a folder, a pipe."""
    hindrance = obstacle(path)
    if hindrance is not None:
        raise InputError(path, *hindrance)


@contextmanager
def readable(path: Path, kind: str = "NIfTI") -> Iterator[None]:
    """Whatever reading a file of a user can raise becomes an InputError that names the file.

    Readers of damaged files raise nearly anything: OverflowError, struct.error, RecursionError.

    Args:
        path: the file that is read.
        kind: what it should be.

    Raises:
        InputError: the reading failed.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            path, "needs more memory than there is", "use a machine with more, or crop it"
        ) from error
    except PermissionError as error:
        raise InputError(
            path, "can't be read (permission denied)", "check its permissions"
        ) from error
    except (EOFError, zlib.error) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            path,
            f"can't be read, its compressed content is truncated or damaged ({problem[:120]})",
            "copy or export it again",
        ) from error
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            path,
            f"can't be read, it is truncated or no {kind} ({problem[:120]})",
            "copy or export it again",
        ) from error


def read_text(path: Path, kind: str = "text", *, names: bool = False) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        kind: what it should be, for the messages.
        names: it holds file names: bytes that are not UTF-8 are kept as Python keeps them in paths.

    Raises:
        InputError: it can't be read, is no text in UTF-8, or is too long to be one of these files.
    """
    check_file(path)
    with readable(path, kind):
        with open(path, "rb") as file:
            content = file.read(_LONGEST_TEXT + 1)
        if len(content) > _LONGEST_TEXT:
            raise InputError(path, f"has more than {_LONGEST_TEXT} bytes", f"expected {kind}")
        if b"\0" not in content:
            try:
                return content.decode("utf-8-sig", "surrogateescape" if names else "strict")
            except UnicodeDecodeError:
                pass
    raise InputError(path, "is no text in UTF-8", f"expected {kind}: save it as UTF-8")


def read_json(path: Path, kind: str) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        kind: what it should be, for the messages.

    Raises:
        InputError: it can't be read, or is no JSON.
    """
    text = read_text(path, kind)
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        problem = one_line(error, 120)
        raise InputError(
            path, f"can't be used, it is no JSON ({problem})", f"expected {kind}"
        ) from error


def read_list(path: Path) -> list[Path]:
    """The paths in a text file, one a line; those that are not absolute start at its folder.

    Raises:
        InputError: it can't be read, or is no text.
    """
    # Not splitlines(): names may hold what it takes for the end of a line.
    lines = read_text(path, "one path a line", names=True).split("\n")
    return [path.parent / line for text in lines if (line := text.strip(" \t\r"))]

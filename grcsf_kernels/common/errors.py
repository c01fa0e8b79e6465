# SPDX-License-Identifier: Apache-2.0
"""The one error that a user's files and settings can cause, and how errors are shown."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

# Set to 1, it shows the traceback as well, for reports of faults.
TRACEBACK = "GRCSF_TRACEBACK"
# What would change the terminal or the line, or can't be encoded: control characters, separators of
# lines, marks of direction, bytes of a file name that are not UTF-8.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def printable(text: object) -> str:
    """Text as one line for terminals, logs and pages.

    File names may hold anything: control characters become escapes such as ``\\x1b`` and ``\\n``,
    and bytes that are not UTF-8 become ``\\xff``.
    """
    return _UNPRINTABLE.sub(lambda found: _escape(found[0]), str(text))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class InputError(Exception):
    """A file or setting that can't be used: one line with what it is, what is wrong, the remedy.

    Names are shown by :func:`printable`, so that the message is one line whatever they hold.

    Args:
        where: the file or the setting.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, where: Path | str, problem: str, remedy: str) -> None:
        super().__init__(printable(f"{where}: {problem}; {remedy}"))
        self.where, self.problem, self.remedy = where, problem, remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[Path | str, str, str]]:
        """Pickled by its three parts: the default, by its one line, breaks a pool of processes."""
        return type(self), (self.where, self.problem, self.remedy)


def show_traceback(error: BaseException) -> None:
    """The traceback on the standard error, where ``GRCSF_TRACEBACK=1`` asks for it."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        text = "".join(traceback.format_exception(error))
        sys.stderr.write(text.encode("ascii", "backslashreplace").decode())


def one_line(error: BaseException, most: int = 160) -> str:
    """The beginning of an error's text, ``most`` characters of it."""
    return " ".join(str(error).split())[:most]

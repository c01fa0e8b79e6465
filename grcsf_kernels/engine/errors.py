# SPDX-License-Identifier: Apache-2.0
"""The one error that a user's files and settings can cause."""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """A file or setting that can't be used: one line with what it is, what is wrong, the remedy.

    Args:
        where: the file or the setting.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, where: Path | str, problem: str, remedy: str) -> None:
        super().__init__(f"{where}: {problem}; {remedy}")
        self.where, self.problem, self.remedy = where, problem, remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[Path | str, str, str]]:
        """Pickled by its three parts: the default, by its one line, breaks a pool of processes."""
        return type(self), (self.where, self.problem, self.remedy)

# SPDX-License-Identifier: Apache-2.0
"""Listing folders of volumes: every layout and every command finds its files here.

Links are followed. What looks like a volume is found by its name alone, whether it can be read or
not: a link whose content is missing is a case that the reader reports, and not one that vanishes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.io.nifti import is_volume, stem
from grcsf_kernels.engine.io.sources import obstacle
from grcsf_kernels.engine.report import Report


def entries(folder: Path) -> list[Path]:
    """What is in a folder, by name.

    Raises:
        InputError: it can't be listed.
    """
    try:
        return sorted(Path(folder).iterdir())
    except OSError as error:
        raise InputError(
            folder,
            f"can't be listed ({error.strerror or error})",
            "check the path and its permissions",
        ) from error


def volumes_in(folder: Path) -> list[Path]:
    """The files of a folder that are called like volumes; none where there is no such folder.

    Raises:
        InputError: it can't be listed.
    """
    return [p for p in entries(folder) if is_volume(p)] if os.path.isdir(folder) else []


def one_each(
    named: Iterable[tuple[str, Path]], report: Report | None
) -> tuple[dict[str, Path], set[str]]:
    """The file of each name.

    Args:
        named: files, each with the name of its case (or of its channel).
        report: takes the names that several files have, such as ``a.nii`` and ``a.nii.gz``: which
            of them is meant nobody can know. None: that does not matter to the caller.

    Returns:
        The files by name, and the names that were reported.
    """
    files: dict[str, list[Path]] = {}
    for name, path in named:
        files.setdefault(name, []).append(path)
    double = {name for name, paths in files.items() if len(paths) > 1}
    for name in sorted(double):
        if report is None:
            break
        first, *others = files[name]
        shown = ", ".join(str(p if p.parent != first.parent else p.name) for p in others)
        report.skip(first, f"{first}: gives the same name {name!r} as {shown}; keep one of them")
    return {name: paths[0] for name, paths in files.items() if name not in double}, double


def by_stem(paths: Iterable[Path], report: Report | None) -> tuple[dict[str, Path], set[str]]:
    """:func:`one_each`, by names without ``.nii`` or ``.nii.gz``."""
    return one_each(((stem(path), path) for path in paths), report)


def listed_once(folder: Path, report: Report | None, seen: set[tuple[int, int]]) -> list[Path]:
    """What is in a folder, by name; nothing where it was listed before, or can't be.

    Args:
        folder: the folder.
        report: takes it if it can't be listed; None: that does not matter to the caller.
        seen: identities of the folders that were listed; that of this one is added.
    """
    try:
        here = identity(folder)
        if here in seen:
            return []
        seen.add(here)
        return entries(folder)
    except InputError as error:
        if report is not None:
            report.skip(folder, str(error))
        return []


def walk(folder: Path, report: Report, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The files in a folder and in all folders below, by name; linked folders are gone through.

    Args:
        folder: where to begin.
        report: takes folders that can't be listed, and links to folders that are not there.
        seen: identities of the folders that were listed: none is twice, whatever links to it.
    """
    for path in listed_once(folder, report, seen):
        if os.path.isdir(path) and not is_volume(path):
            if not path.name.startswith("."):
                yield from walk(path, report, seen)
        elif os.path.islink(path) and not path.suffix and (problem := obstacle(path)):
            report.skip(path, f"{path}: {'; '.join(problem)}")
        else:
            yield path


def identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from all others, whatever link it is reached by.

    Raises:
        InputError: it is not there.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise InputError(folder, *(obstacle(folder) or ("is gone", "check the path"))) from error
    return status.st_dev, status.st_ino

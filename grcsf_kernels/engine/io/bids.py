# SPDX-License-Identifier: Apache-2.0
"""BIDS data sets with lesion masks: raw, derivatives, and both beside each other.

Source: BIDS specification 1.10, https://bids-specification.readthedocs.io; ATLAS R2.0, Liew et al.,
Scientific Data 2022, doi 10.1038/s41597-022-01401-7.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grcsf_kernels.engine.io.nifti import is_volume, stem
from grcsf_kernels.engine.io.search import by_stem, listed_once, walk
from grcsf_kernels.engine.report import Report, warn

# How deep below the folder the subjects may be: ATLAS has Training/R001/sub-r001s001.
_DEPTH = 3
_MASKS = ("mask", "msk", "dseg", "roi")
_NATIVE = ("", "orig", "individual", "native", "T1w")  # values of space


@dataclass(frozen=True)
class _File:
    path: Path
    suffix: str
    entities: dict[str, str]

    @property
    def session(self) -> str:
        """``sub-<label>``, with ``_ses-<label>`` where there is one."""
        names = [f"{k}-{self.entities[k]}" for k in ("sub", "ses") if k in self.entities]
        return "_".join(names)

    @property
    def run(self) -> str:
        return self.entities.get("run", "")

    @property
    def space(self) -> str:
        space = self.entities.get("space", "")
        return "" if space in _NATIVE else space

    @property
    def is_lesion(self) -> bool:
        """A mask that says so: ``label-L`` or ``label-lesion``, or a ``desc`` with "lesion".

        In ISLES a plain ``msk`` (2022) and ``lesion-msk`` (2024) are lesion masks.
        """
        label = self.entities.get("label", "").lower()
        described = "lesion" in self.entities.get("desc", "").lower()
        plain = "label" not in self.entities and "desc" not in self.entities
        if self.suffix == "lesion-msk" or (self.suffix == "msk" and plain):
            return True
        return self.suffix in _MASKS and (label in ("l", "lesion") or described)

    @property
    def is_mask(self) -> bool:
        """A mask or segmentation of anything."""
        return self.suffix in _MASKS or self.suffix.endswith("-msk")


def is_bids(folder: Path) -> bool:
    """Whether the folder has, or is, a folder of a subject."""
    return next(_subjects(folder, None, _DEPTH, set()), None) is not None


def _subjects(
    folder: Path, report: Report | None, depth: int, seen: set[tuple[int, int]]
) -> Iterator[Path]:
    """Folders called ``sub-``, at most ``depth`` folders down; links are followed, once."""
    if folder.name.startswith("sub-"):
        yield folder
        return
    for path in listed_once(folder, report, seen):
        if path.name.startswith("sub-") and not is_volume(path):
            # A link whose target is missing is one of them: walk() says so.
            if os.path.isdir(path) or os.path.islink(path):
                yield path
        elif depth and os.path.isdir(path) and not path.name.startswith("."):
            yield from _subjects(path, report, depth - 1, seen)


def _files(folder: Path, report: Report) -> list[_File]:
    found: dict[Path, None] = {}
    seen: set[tuple[int, int]] = set()
    for subject in list(_subjects(folder, report, _DEPTH, seen)):
        found.update(dict.fromkeys(walk(subject, report, seen)))
    files = []
    for path in sorted(p for p in found if is_volume(p) and p.name.startswith("sub-")):
        *pairs, suffix = stem(path).split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        files.append(_File(path, suffix, entities))
    return files


def pairs(
    folder: Path, report: Report, suffixes: Sequence[str], *, labels: bool = True
) -> tuple[dict[str, list[Path]], dict[str, Path], set[str]]:
    """Images (a path for each channel) and lesion masks by case ``sub-<label>[_ses-][_run-]``.

    The images are those in the space of the lesion masks; without any mask the raw ones. Sessions
    that have none of them are named.

    Args:
        folder: the data set, or one subject of it.
        report: takes what is ambiguous or misses a channel.
        suffixes: one for each channel, such as ``T1w``; none: masks alone.
        labels: whether the masks are needed.

    Returns:
        Images, masks, and the cases that were reported.
    """
    every = _files(folder, report)
    files, masks = _of_one_space(folder, every, suffixes, labels)
    _say_missing(folder, every, files, suffixes, " in the space of the lesion masks" * bool(masks))
    double: set[str] = set()
    for paths in _by_folder((*files, *(masks if labels else ()))).values():
        double |= by_stem(paths, report)[1]

    found: dict[str, list[Path]] = {}
    drawn_of: dict[str, Path] = {}
    reported: set[str] = set()
    for session in sorted({file.session for file in (*files, *masks)}):
        here = [file for file in files if file.session == session]
        drawn = [mask for mask in masks if mask.session == session]
        runs = sorted({file.run for file in here or drawn})
        used: list[_File] = []
        for run in runs:
            name = f"{session}_run-{run}" if run else session
            own = [mask for mask in drawn if mask.run == run or (not mask.run and len(runs) == 1)]
            shown = [file for file in here if file.run == run]
            used += own
            if not labels:
                own = own[:1]  # it says which image is meant, no more
            if any(stem(file.path) in double for file in (*shown, *own * labels)):
                reported.add(name)
                continue
            if not _case(name, shown, own, suffixes, report, found):
                reported.add(name)
            if len(own) == 1 and (name in found or not here):
                drawn_of[name] = own[0].path
        for mask in drawn if labels and suffixes else ():
            if mask not in used:
                report.skip(mask.path, f"{mask.path}: has no image of its run; add it")
    return found, drawn_of, reported


def _of_one_space(
    folder: Path, every: Sequence[_File], suffixes: Sequence[str], labels: bool
) -> tuple[list[_File], list[_File]]:
    """Images and lesion masks in the space of the masks; without any mask the raw images."""
    masks = [file for file in every if file.is_lesion]
    images = [file for file in every if file.suffix in suffixes]
    if masks:
        space = min(mask.space for mask in masks)
        _say_sessions([m for m in masks if m.space != space], masks, space, "masks")
        masks = [mask for mask in masks if mask.space == space]
        return [file for file in images if file.space == space], masks
    inside = [file for file in images if "derivatives" not in file.path.parts]
    space = min((file.space for file in inside or images), default="")
    others = sorted({file.suffix for file in every if file.is_mask})
    if labels and others:
        warn(
            f"{folder}: masks called {', '.join(others)} are not taken for lesions: expected "
            "label-lesion or a desc with lesion in it"
        )
    return [file for file in inside or images if file.space == space], masks


def _by_folder(files: Sequence[_File]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.path.parent, []).append(file.path)
    return folders


def _say_sessions(left: list[_File], all_of: list[_File], space: str, what: str) -> None:
    """Name the sessions whose files are all in another space."""
    kept = {file.session for file in all_of if file.space == space}
    lost = sorted({file.session for file in left} - kept)
    if lost:
        warn(
            f"{len(lost)} session(s) have {what} in space {left[0].space or 'native'} only, and "
            f"the others in {space or 'native'}; left out: {', '.join(lost[:5])}"
        )


def _say_missing(
    folder: Path, every: list[_File], files: list[_File], suffixes: Sequence[str], where: str
) -> None:
    """Name the sessions without any image that is wanted."""
    lost = sorted({file.session for file in every} - {file.session for file in files})
    if not suffixes or not lost:
        return
    there = sorted({f.suffix for f in every if f.session in lost and not f.is_mask})
    warn(
        f"{folder}: {len(lost)} session(s) have no {' or '.join(suffixes)}{where} and "
        f"are left out, such as {', '.join(lost[:5])}; they have "
        f"{', '.join(there) or 'no image'} (data.bids_suffixes)"
    )


def _case(
    name: str,
    images: list[_File],
    masks: list[_File],
    suffixes: Sequence[str],
    report: Report,
    found: dict[str, list[Path]],
) -> bool:
    """Put the channels of a case into ``found``, or say why not; whether it is usable."""
    if not images:
        return True
    if len(masks) > 1:
        shown = ", ".join(mask.path.name for mask in masks)
        report.skip(masks[0].path, f"{name}: has several lesion masks ({shown}); merge them")
        return False
    channels = []
    for suffix in suffixes:
        fitting = [file for file in images if file.suffix == suffix]
        if len(fitting) > 1:
            fitting = _closest(fitting, masks)
        if len(fitting) != 1:
            shown = ", ".join(file.path.name for file in fitting)
            problem = f"has several {suffix} ({shown})" if fitting else f"has no {suffix}"
            remedy = "keep one" if fitting else "add it, or correct data.bids_suffixes"
            report.skip(images[0].path, f"{images[0].path.parent}: {name} {problem}; {remedy}")
            return False
        channels.append(fitting[0].path)
    found[name] = channels
    return True


def _closest(images: list[_File], masks: list[_File]) -> list[_File]:
    """The images whose acquisition the mask names, then those beside it; without a mask the raw."""
    if masks:

        def distance(image: _File) -> tuple[bool, bool, bool]:
            same = all(
                image.entities.get(key) == masks[0].entities.get(key)
                for key in ("acq", "ce", "rec", "dir", "part", "echo", "inv", "res")
            )
            beside = image.path.parent == masks[0].path.parent
            return not same, not beside, "desc" in image.entities

    else:

        def distance(image: _File) -> tuple[bool, bool, bool]:
            return "derivatives" in image.path.parts, "desc" in image.entities, False

    best = min(distance(image) for image in images)
    return [image for image in images if distance(image) == best]

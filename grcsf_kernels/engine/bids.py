# SPDX-License-Identifier: Apache-2.0
"""BIDS data sets with lesion masks: raw, derivatives, and both beside each other.

Source: BIDS specification 1.10, https://bids-specification.readthedocs.io; ATLAS R2.0, Liew et al.,
Scientific Data 2022, doi 10.1038/s41597-022-01401-7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.volumes import is_volume, stem

# How deep below the folder the subjects may be: ATLAS has Training/R001/sub-r001s001.
_SUBJECTS = ("sub-*", "*/sub-*", "*/*/sub-*", "*/*/*/sub-*")
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
        """A mask that says so: ``label-L`` or ``label-lesion``, or a ``desc`` with "lesion"."""
        label = self.entities.get("label", "").lower()
        described = "lesion" in self.entities.get("desc", "").lower()
        return self.suffix == "mask" and (label in ("l", "lesion") or described)


def is_bids(folder: Path) -> bool:
    """Whether the folder has, or is, a folder of a subject."""
    return next(_subject_folders(folder), None) is not None


def _subject_folders(folder: Path) -> Iterator[Path]:
    if folder.name.startswith("sub-"):
        yield folder
    for pattern in _SUBJECTS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_dir())


def _files(folder: Path) -> list[_File]:
    paths = {p for subject in _subject_folders(folder) for p in subject.rglob("sub-*")}
    files = []
    for path in sorted(p for p in paths if is_volume(p)):
        *pairs, suffix = stem(path).split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        files.append(_File(path, suffix, entities))
    return files


def pairs(
    folder: Path, report: Report, suffixes: Sequence[str]
) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """Images (a path for each channel) and lesion masks by case ``sub-<label>[_ses-][_run-]``.

    The images are those in the space of the lesion masks; without any mask the raw ones.

    Args:
        folder: the data set, or one subject of it.
        report: takes what is ambiguous or misses a channel.
        suffixes: one for each channel, such as ``T1w``; none: masks alone.
    """
    files = _files(folder)
    masks = [file for file in files if file.is_lesion]
    images = [file for file in files if file.suffix in suffixes]
    if masks:
        space = min(mask.space for mask in masks)
        masks = [mask for mask in masks if mask.space == space]
    else:
        inside = (file for file in images if "derivatives" not in file.path.parts)
        images = list(inside) or images
        space = min((file.space for file in images), default="")
    images = [file for file in images if file.space == space]

    found: dict[str, list[Path]] = {}
    labels: dict[str, Path] = {}
    for session in sorted({file.session for file in (*images, *masks)}):
        here = [file for file in images if file.session == session]
        drawn = [mask for mask in masks if mask.session == session]
        runs = sorted({file.run for file in here or drawn})
        for run in runs:
            name = f"{session}_run-{run}" if run else session
            own = [mask for mask in drawn if mask.run == run or (not mask.run and len(runs) == 1)]
            _case(name, [file for file in here if file.run == run], own, suffixes, report, found)
            if len(own) == 1 and (name in found or not here):
                labels[name] = own[0].path
    return found, labels


def _case(
    name: str,
    images: list[_File],
    masks: list[_File],
    suffixes: Sequence[str],
    report: Report,
    found: dict[str, list[Path]],
) -> None:
    """Put the channels of a case into ``found``, or say why there are none."""
    if not images:
        return
    if len(masks) > 1:
        shown = ", ".join(mask.path.name for mask in masks)
        report.skip(masks[0].path, f"{name}: has several lesion masks ({shown}); merge them")
        return
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
            return
        channels.append(fitting[0].path)
    found[name] = channels


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

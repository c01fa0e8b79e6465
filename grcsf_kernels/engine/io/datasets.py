# SPDX-License-Identifier: Apache-2.0
"""Finding cases in folders: two layouts of our own, nnU-Net's raw data sets, and BIDS.

docs/data.md describes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.io import bids
from grcsf_kernels.engine.io.nifti import SUFFIXES, stem
from grcsf_kernels.engine.io.search import by_stem, one_each, volumes_in
from grcsf_kernels.engine.io.sources import obstacle, read_json
from grcsf_kernels.engine.report import Report, warn

MADE_BY_US = ("_label", "_mask", "_residual", "_probability", "_uncertainty")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_WANTED = (
    "expected <case>_image.nii.gz and <case>_label.nii.gz, images/ and labels/, an nnU-Net raw "
    "data set or BIDS with lesion masks"
)


@dataclass(frozen=True)
class Case:
    """One image of one subject: its name and its files.

    Attributes:
        name: unique among the cases of a folder; what is written is called after it.
        image: the file of the first channel.
        label: the file of the lesion mask.
        more: the files of the other channels, in order.
    """

    name: str
    image: Path
    label: Path | None = None
    more: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of all channels."""
        return (self.image, *self.more)

    @property
    def subject(self) -> str:
        """Who was imaged: ``sub-<label>`` of a name that begins with it, else the name."""
        found = re.match(r"sub-[A-Za-z0-9]+", self.name)
        return found.group() if found else self.name


def find_cases(
    folder: Path,
    report: Report,
    *,
    labels: bool,
    suffixes: Sequence[str] = ("T1w",),
    lesion_labels: Sequence[int] | None = None,
) -> list[Case]:
    """The cases of a folder, by name.

    Four layouts: ``<case>_image.nii.gz`` with ``<case>_label.nii.gz`` beside it;
    ``images/<case>.nii.gz`` with ``labels/<case>.nii.gz``; nnU-Net's raw data sets (the folder with
    ``dataset.json``, or one of its image folders); BIDS with lesion masks beside the images or in
    ``derivatives/``. Where labels are not needed, a folder of any other NIfTI files will do.

    Args:
        folder: the folder, or one image.
        report: takes the pairs with a missing half, and cases with a missing channel.
        labels: whether each case needs a label.
        suffixes: of BIDS images, one for each channel.
        lesion_labels: the label values that are lesions, which decides whether the labels that a
            ``dataset.json`` declares can be used; None: 1 alone.

    Raises:
        InputError: the folder does not exist or holds no case, or ``dataset.json`` can't be used.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = obstacle(folder)
        if problem is not None and not os.path.isfile(folder):
            raise InputError(folder, *problem)
        if labels:
            raise InputError(folder, "is a file", "expected a folder of images and labels")
        return [_single(folder, report)]
    images, found, reported = _pairs(folder, report, labels, suffixes, lesion_labels)
    for name in sorted(found.keys() - images.keys() - reported):
        report.skip(found[name], f"{found[name]}: has no image; add it or remove the label")
    cases = []
    for name, (image, *more) in sorted(images.items()):
        if name in reported:
            continue
        if labels and name not in found:
            report.skip(image, f"{image}: has no label; {_remedy(name, image)}")
            continue
        cases.append(Case(name, image, found.get(name), tuple(more)))
    if not cases:
        why = "see the reasons above" if report.failed else _WANTED
        raise InputError(folder, "holds no usable case", why)
    return cases


def _remedy(name: str, image: Path) -> str:
    """What to do about a label that is not there: there may be one of another name."""
    others = [p for p in volumes_in(image.parent) if stem(p).startswith(f"{name}_") and p != image]
    others = [p for p in others if not stem(p).endswith(MADE_BY_US[2:])]
    if stem(image) != f"{name}_image" or not others:
        return "add it or remove the image"
    return f"if {others[0].name} is it, call it {name}_label.nii.gz"


def find_labels(
    folder: Path, report: Report, lesion_labels: Sequence[int] | None = None
) -> list[Case]:
    """The cases to measure: those of :func:`find_cases`, or of a folder that holds labels alone.

    Without an image, a label is its own reference for shape and affine.

    Raises:
        InputError: the folder does not exist or holds no label.
    """
    folder = Path(folder)
    files = volumes_in(folder)
    apart = os.path.isdir(folder / "images") or any(stem(p).endswith("_image") for p in files)
    if not files and not apart and os.path.isdir(folder) and bids.is_bids(folder):
        _, masks, reported = bids.pairs(folder, report, ())
        return [Case(n, path, path) for n, path in sorted(masks.items()) if n not in reported]
    if apart or not files:
        return find_cases(folder, report, labels=True, lesion_labels=lesion_labels)
    own = [p for p in files if not stem(p).endswith(MADE_BY_US[1:])]
    found, _ = one_each(((stem(p).removesuffix("_label"), p) for p in own), report)
    if not found:
        raise InputError(folder, "holds no label", "expected <case>_label.nii.gz")
    return [Case(name, path, path) for name, path in sorted(found.items())]


def find_masks(folder: Path, report: Report) -> tuple[dict[str, Path], set[str]]:
    """The masks ``<case>_mask.nii.gz`` of a folder by case, and the cases that have several.

    Raises:
        InputError: the folder can't be listed.
    """
    masks = [path for path in volumes_in(folder) if stem(path).endswith("_mask")]
    return one_each(((stem(path).removesuffix("_mask"), path) for path in masks), report)


# Images by case (a path for each channel), labels by case, and the cases that were reported.
_Pairs = tuple[dict[str, list[Path]], dict[str, Path], set[str]]


def _pairs(
    folder: Path,
    report: Report,
    labels: bool,
    suffixes: Sequence[str],
    lesion_labels: Sequence[int] | None,
) -> _Pairs:
    root = _nnunet_root(folder)
    if root is not None:
        description = _dataset_json(root)
        if labels:
            _check_labels(root, description, lesion_labels)
        return _nnunet(root, folder, description, report, labels)
    if os.path.isdir(folder / "images"):
        files, double = by_stem(volumes_in(folder / "images"), report)
        found, other = by_stem(volumes_in(folder / "labels"), report if labels else None)
        rest = [p for p in volumes_in(folder) if not stem(p).endswith(MADE_BY_US)]
        _say_left_out(folder, rest, "only those in images and labels are taken")
        images = {name: [path] for name, path in files.items()}
        return images, found, double | (other if labels else set())
    every = volumes_in(folder)
    chosen = [p for p in every if stem(p).endswith(("_image", "_label"))]
    if not chosen and bids.is_bids(folder):
        return bids.pairs(folder, report, suffixes, labels=labels)
    own = [p for p in chosen if stem(p).endswith("_label")]
    named = ((stem(p).removesuffix("_label"), p) for p in own)
    found, other = one_each(named, report if labels else None)
    other = other if labels else set()
    plain = [p for p in every if not stem(p).endswith(("_image", *MADE_BY_US))]
    if len(own) < len(chosen) or labels:
        pictures = [p for p in chosen if stem(p).endswith("_image")]
        files, double = one_each(((stem(p).removesuffix("_image"), p) for p in pictures), report)
        _say_left_out(folder, plain, "names end in neither _image nor _label")
        return {name: [path] for name, path in files.items()}, found, double | other
    files, double = by_stem(plain, report)
    channels = _channels(files, double)
    if channels:
        return channels, found, {name.rsplit("_", 1)[0] for name in double}
    return {name: [path] for name, path in files.items()}, found, double


def _say_left_out(folder: Path, paths: Sequence[Path], why: str) -> None:
    if paths:
        warn(f"{folder}: {len(paths)} file(s) are left out, such as {paths[0].name}: {why}")


def _single(path: Path, report: Report) -> Case:
    """A case of one file; in an nnU-Net data set with the other channels beside it."""
    name = stem(path)
    part = _CHANNEL.fullmatch(name)
    if part and _nnunet_root(path.parent) is not None:
        if part[2] != "0000":
            raise InputError(path, "is not the first channel", f"name {part[1]}_0000 instead")
        beside = [p for p in volumes_in(path.parent) if stem(p)[:-5] == part[1]]
        channels = [p for p in beside if _CHANNEL.fullmatch(stem(p))]
        files, double = by_stem(channels, report)
        if double:
            raise InputError(path, "has a channel of two files", "keep one of them")
        images = [files[channel] for channel in sorted(files)]
        return Case(part[1], images[0], None, tuple(images[1:]))
    return Case(name.removesuffix("_image"), path)


def _channels(files: dict[str, Path], double: set[str]) -> dict[str, list[Path]]:
    """Files that are all ``<case>_<four digits>``, from ``_0000`` on, by case; else nothing.

    ``double``: names that are there, and of which no file is used.
    """
    parts = {name: _CHANNEL.fullmatch(name) for name in {*files, *double}}
    numbers: dict[str, list[str]] = {}
    for name, part in sorted(parts.items()):
        if part is None or int(part[2]) != len(numbers.setdefault(part[1], [])):
            return {}
        numbers[part[1]].append(name)
    return {
        case: [files[name] for name in names]
        for case, names in numbers.items()
        if not double.intersection(names)
    }


def _nnunet_root(folder: Path) -> Path | None:
    """The nnU-Net data set that ``folder`` is, or whose image folder it is."""
    folder = folder.resolve()
    if os.path.isdir(folder / "imagesTr"):
        if not os.path.lexists(folder / "dataset.json"):
            raise InputError(
                folder, "has imagesTr and no dataset.json", "add the dataset.json of nnU-Net"
            )
        return folder
    beside = os.path.lexists(folder.parent / "dataset.json")
    return folder.parent if re.fullmatch("images[A-Z].*", folder.name) and beside else None


def _dataset_json(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    kind = "the dataset.json of nnU-Net"
    description = read_json(path, kind)
    names = labels = None
    if isinstance(description, dict):
        names = description.get("channel_names", description.get("modality"))
        labels = description.get("labels")
    if not isinstance(names, dict) or not isinstance(labels, dict) or not names:
        problem = "can't be used (channel_names and labels have to be mappings)"
        raise InputError(path, problem, f"expected {kind}")
    ending = description.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise InputError(
            path,
            f"has file_ending {str(ending)[:40]!r}",
            f"expected {' or '.join(SUFFIXES)}: convert them",
        )
    return {"channels": len(names), "labels": labels, "ending": ending}


def _check_labels(
    root: Path, description: dict[str, Any], lesion_labels: Sequence[int] | None
) -> None:
    """InputError where the declared labels are more than a lesion of 1."""
    values = set()
    for name, value in description["labels"].items():
        # nnU-Net's first version has {value: name}.
        parts = [name] if isinstance(value, str) else value if isinstance(value, list) else [value]
        values |= {str(part) for part in parts} - {"0"}
    if lesion_labels is None and values != {"1"}:
        shown = ", ".join(f"{name}: {value}" for name, value in description["labels"].items())
        raise InputError(
            root / "dataset.json",
            f"has the labels {shown[:200]}",
            "set lesion_labels to the values that are lesions; the others count as background",
        )


def _nnunet(
    root: Path, folder: Path, description: dict[str, Any], report: Report, labels: bool
) -> _Pairs:
    inside = root / "imagesTr" if folder.resolve() == root else folder
    ending, count = description["ending"], description["channels"]
    files, double = by_stem(volumes_in(inside), report)
    reported = {name.rsplit("_", 1)[0] for name in double}
    parts: dict[str, dict[int, Path]] = {}
    for name, path in files.items():
        part = _CHANNEL.fullmatch(name)
        if part is None or not path.name.lower().endswith(ending):
            report.skip(path, f"{path}: has no channel number; expected <case>_0000{ending}")
        else:
            parts.setdefault(part[1], {})[int(part[2])] = path
    images = {}
    for name, channels in parts.items():
        if name in reported:
            continue
        missing = [index for index in range(count) if index not in channels]
        if missing or len(channels) != count:
            reported.add(name)
            path = inside / f"{name}_{missing[0] if missing else max(channels):04d}{ending}"
            problem = "does not exist" if missing else "is not among the channels of dataset.json"
            report.skip(path, f"{path}: {problem}; expected {count} channel(s) for each case")
        else:
            images[name] = [channels[index] for index in range(count)]
    beside = root / f"labels{inside.name.removeprefix('images')}"
    found, other = by_stem(volumes_in(beside), report if labels else None)
    wrong = {name for name, path in found.items() if not path.name.lower().endswith(ending)}
    for name in sorted(wrong) if labels else ():
        report.skip(found[name], f"{found[name]}: does not end in {ending}; convert it")
    found = {name: path for name, path in found.items() if name not in wrong}
    return images, found, reported | (other | wrong if labels else set())


def residual_path(residuals: Path, case: Case) -> Path:
    """The file of a case in a folder of residual maps."""
    return Path(residuals) / f"{case.name}_residual.nii.gz"

# SPDX-License-Identifier: Apache-2.0
"""Finding cases in folders: two layouts of our own, nnU-Net's raw data sets, and BIDS.

docs/data.md describes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grcsf_kernels.engine import bids
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.volumes import SUFFIXES, is_volume, stem

_MADE_BY_US = ("_label", "_mask", "_residual", "_probability", "_uncertainty")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_WANTED = (
    "expected <case>_image.nii.gz and <case>_label.nii.gz, images/ and labels/, an nnU-Net raw "
    "data set or BIDS (docs/data.md)"
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
    if folder.is_file():
        if labels:
            raise InputError(folder, "is a file", "expected a folder of images and labels")
        return [_single(folder)]
    if not folder.is_dir():
        raise InputError(folder, "does not exist", "check the path")
    images, found = _pairs(folder, report, labels, suffixes, lesion_labels)
    for name in sorted(found.keys() - images.keys()):
        report.skip(found[name], f"{found[name]}: has no image; add it or remove the label")
    cases = []
    for name, (image, *more) in sorted(images.items()):
        if labels and name not in found:
            report.skip(image, f"{image}: has no label; add it or remove the image")
            continue
        cases.append(Case(name, image, found.get(name), tuple(more)))
    if not cases:
        raise InputError(folder, "holds no usable case", _WANTED)
    return cases


def find_labels(
    folder: Path, report: Report, lesion_labels: Sequence[int] | None = None
) -> list[Case]:
    """The cases to measure: those of :func:`find_cases`, or of a folder that holds labels alone.

    Without an image, a label is its own reference for shape and affine.

    Raises:
        InputError: the folder does not exist or holds no label.
    """
    folder = Path(folder)
    files = [p for p in sorted(folder.iterdir()) if is_volume(p)] if folder.is_dir() else []
    apart = (folder / "images").is_dir() or any(stem(p).endswith("_image") for p in files)
    if not files and not apart and folder.is_dir() and bids.is_bids(folder):
        _, masks = bids.pairs(folder, report, ())
        return [Case(name, path, path) for name, path in sorted(masks.items())]
    if apart or not files:
        return find_cases(folder, report, labels=True, lesion_labels=lesion_labels)
    found = [p for p in files if not stem(p).endswith(_MADE_BY_US[1:])]
    if not found:
        raise InputError(folder, "holds no label", "expected <case>_label.nii.gz")
    return [Case(stem(path).removesuffix("_label"), path, path) for path in found]


# Images by case (a path for each channel), and labels by case.
_Pairs = tuple[dict[str, list[Path]], dict[str, Path]]


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
        return _nnunet(root, folder, description, report)
    if (folder / "images").is_dir():
        images = {stem(p): [p] for p in folder.glob("images/*") if is_volume(p)}
        return images, {stem(p): p for p in folder.glob("labels/*") if is_volume(p)}
    files = {stem(p): p for p in folder.iterdir() if is_volume(p)}
    images = {n.removesuffix("_image"): [p] for n, p in files.items() if n.endswith("_image")}
    found = {n.removesuffix("_label"): p for n, p in files.items() if n.endswith("_label")}
    if not images and not found and bids.is_bids(folder):
        return bids.pairs(folder, report, suffixes)
    if not images and not labels:
        plain = {n: p for n, p in files.items() if not n.endswith(_MADE_BY_US)}
        images = _channels(plain) or {name: [path] for name, path in plain.items()}
    return images, found


def _single(path: Path) -> Case:
    """A case of one file; in an nnU-Net data set with the other channels beside it."""
    name = stem(path)
    part = _CHANNEL.fullmatch(name)
    if part and _nnunet_root(path.parent) is not None:
        if part[2] != "0000":
            raise InputError(path, "is not the first channel", f"name {part[1]}_0000 instead")
        beside = sorted(p for p in path.parent.iterdir() if is_volume(p))
        images = [p for p in beside if (m := _CHANNEL.fullmatch(stem(p))) and m[1] == part[1]]
        return Case(part[1], images[0], None, tuple(images[1:]))
    return Case(name.removesuffix("_image"), path)


def _channels(files: dict[str, Path]) -> dict[str, list[Path]]:
    """Files that are all ``<case>_<four digits>``, from ``_0000`` on, by case; else nothing."""
    parts = {name: _CHANNEL.fullmatch(name) for name in files}
    cases: dict[str, list[Path]] = {}
    for name, part in sorted(parts.items()):
        if part is None or int(part[2]) != len(cases.setdefault(part[1], [])):
            return {}
        cases[part[1]].append(files[name])
    return cases


def _nnunet_root(folder: Path) -> Path | None:
    """The nnU-Net data set that ``folder`` is, or whose image folder it is."""
    folder = folder.resolve()
    if (folder / "imagesTr").is_dir():
        if not (folder / "dataset.json").is_file():
            raise InputError(
                folder, "has imagesTr and no dataset.json", "add the dataset.json of nnU-Net"
            )
        return folder
    if re.fullmatch("images[A-Z].*", folder.name) and (folder.parent / "dataset.json").is_file():
        return folder.parent
    return None


def _dataset_json(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    try:
        description = json.loads(path.read_text())
        names = description.get("channel_names", description.get("modality"))
        labels = description["labels"]
        if not isinstance(names, dict) or not isinstance(labels, dict) or not names:
            raise ValueError("channel_names and labels have to be mappings")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            path, f"can't be used ({problem})", "expected the dataset.json of nnU-Net"
        ) from error
    ending = description.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise InputError(
            path, f"has file_ending {ending!r}", f"expected {' or '.join(SUFFIXES)}: convert them"
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
            f"has the labels {shown}",
            "set lesion_labels to the values that are lesions; the others count as background",
        )


def _nnunet(root: Path, folder: Path, description: dict[str, Any], report: Report) -> _Pairs:
    inside = root / "imagesTr" if folder.resolve() == root else folder
    ending, count = description["ending"], description["channels"]
    parts: dict[str, dict[int, Path]] = {}
    for path in sorted(p for p in inside.iterdir() if is_volume(p)):
        part = _CHANNEL.fullmatch(stem(path))
        if part is None or not path.name.endswith(ending):
            report.skip(path, f"{path}: has no channel number; expected <case>_0000{ending}")
        else:
            parts.setdefault(part[1], {})[int(part[2])] = path
    images, broken = {}, set()
    for name, channels in parts.items():
        missing = [index for index in range(count) if index not in channels]
        if missing or len(channels) != count:
            broken.add(name)
            path = inside / f"{name}_{missing[0] if missing else max(channels):04d}{ending}"
            problem = "does not exist" if missing else "is not among the channels of dataset.json"
            report.skip(path, f"{path}: {problem}; expected {count} channel(s) for each case")
        else:
            images[name] = [channels[index] for index in range(count)]
    beside = root / f"labels{inside.name.removeprefix('images')}"
    found = {stem(p): p for p in beside.glob(f"*{ending}") if is_volume(p)}
    return images, {name: path for name, path in found.items() if name not in broken}

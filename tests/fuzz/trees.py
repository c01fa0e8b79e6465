# SPDX-License-Identifier: Apache-2.0
"""Folders in every layout with something wrong: no case of them may vanish without a word."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from grcsf_kernels import engine
from grcsf_kernels.common.errors import printable
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.datasets import find_cases, find_labels, find_masks
from grcsf_kernels.engine.io.nifti import read_geometry, stem

_DRAWN = "sub-{0}/ses-1/anat/sub-{0}_ses-1_label-L_mask.nii.gz"
# Files of a case; "{}" is its name.
LAYOUTS = {
    "pairs": ("{}_image.nii.gz", "{}_label.nii.gz"),
    "folders": ("images/{}.nii.gz", "labels/{}.nii.gz"),
    "nnunet": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
    "bids": ("sub-{0}/ses-1/anat/sub-{0}_ses-1_T1w.nii.gz", _DRAWN),
    "isles": ("sub-{0}/anat/sub-{0}_T1w.nii.gz", "derivatives/sub-{0}/sub-{0}_msk.nii.gz"),
    "plain": ("{}.nii.gz", "{}_label.nii.gz"),
}
_NAMES = ("a", "B", "c1", "x[y]", "z\x1b[2J", "n\nl", os.fsdecode(b"\xfc"), "w" * 190, "ü")
_PLAIN = ("a", "B", "c1", "d2", "e3", "f4")


def _damage(rng: np.random.Generator, root: Path, path: Path) -> bool:
    """Do something to a file of a case; whether it is not there any more, under any name."""
    kind = int(rng.integers(10))
    if kind == 0:
        path.unlink()
        return True
    if kind == 1:
        path.unlink()
        path.symlink_to("../.git/annex/objects/gone")
    elif kind == 2:
        path.with_name(path.name.replace(".nii.gz", ".nii")).touch()
    elif kind == 3:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        path.unlink()
        os.mkfifo(path)
    elif kind == 6:
        path.unlink()
        path.symlink_to(path.name)
    elif kind == 7 and path.parent != root:
        elsewhere = root.parent / f"elsewhere{rng.integers(1 << 30)}"
        path.parent.rename(elsewhere)
        path.parent.symlink_to(elsewhere)
    elif kind == 8 and not os.path.lexists(path.parent / "loop"):
        (path.parent / "loop").symlink_to(root)
    elif kind == 9:
        path.with_name(f".{path.name}").touch()
    return False


def check_tree(
    rng: np.random.Generator, folder: Path, bounded: Callable[[], AbstractContextManager[None]]
) -> str:
    """Find the cases of a folder; every image that is there is in a case or in the report."""
    layout = str(rng.choice(list(LAYOUTS)))
    root = folder / "data"
    root.mkdir()
    names = _PLAIN if layout in ("bids", "isles") else _NAMES
    chosen = [str(n) for n in rng.choice(names, size=int(rng.integers(1, 6)), replace=False)]
    images = {name: root / LAYOUTS[layout][0].format(name) for name in chosen}
    labels = {name: root / LAYOUTS[layout][1].format(name) for name in chosen}
    for path in (*images.values(), *labels.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if layout == "nnunet":
        description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}}
        (root / "dataset.json").write_text(json.dumps(description))
    gone: set[str] = set()
    for _ in range(int(rng.integers(0, 4))):
        name, files = (
            chosen[int(rng.integers(len(chosen)))],
            images if rng.random() < 0.6 else labels,
        )
        path = files[name]
        if os.path.isfile(path) and not os.path.islink(path) and _damage(rng, root, path):
            gone |= {name} if files is images else set()
    needed = layout != "plain" and rng.random() < 0.6
    report = engine.Report()
    refused = ""
    cases = []
    with bounded():
        try:
            cases = find_cases(root, report, labels=needed)
        except InputError as error:
            refused = str(error)
        for find in (find_labels, find_masks):
            try:
                find(root, engine.Report())
            except InputError as error:
                assert str(error).isprintable(), error
        for case in cases:
            try:
                read_geometry(case.image)
            except InputError as error:
                assert str(error).isprintable(), error
    assert refused.isprintable(), refused
    said = "\n".join([refused, *(line for _, line in report.failed)])
    assert all(line.isprintable() for _, line in report.failed), said
    found = [case.name.removeprefix("sub-").removesuffix("_ses-1") for case in cases]
    assert len(set(found)) == len(found), found
    for name in set(chosen) - gone - set(found):
        shown = [printable(stem(path)) for path in (images[name], labels[name])]
        listed = any(one in said for one in (*shown, "can't be listed", f"sub-{name}"))
        assert listed, (layout, name, found, said)
    return f"{layout} {'refused' if refused else 'found'}"

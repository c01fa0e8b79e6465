# SPDX-License-Identifier: Apache-2.0
"""Which cases train and which validate: from the seed, or from a file of nnU-Net."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.config import TrainConfig
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.sources import read_json
from grcsf_kernels.engine.report import warn
from grcsf_kernels.engine.seeding import seed_of

Split = tuple[list[int], list[int]]


def split(cases: Sequence[Case], config: TrainConfig) -> Split:
    """Indices of the training and of the validation cases.

    ``splits_file`` comes before ``folds``, and ``folds`` before ``validation_fraction``. The last
    two shuffle subjects by the seed, so all sessions of a subject are on one side.

    Raises:
        InputError: a file that can't be used, more folds than subjects, or no case to train on.
    """
    if config.splits_file is not None:
        return _from_file(cases, Path(config.splits_file), config.fold)
    subjects = list(dict.fromkeys(case.subject for case in cases))
    generator = torch.Generator().manual_seed(seed_of(config.optimization.seed, 1))
    order = torch.randperm(len(subjects), generator=generator).tolist()
    if config.folds:
        if len(subjects) < config.folds:
            raise InputError(
                "folds", f"is {config.folds}", f"expected at most the {len(subjects)} subjects"
            )
        held = set(order[config.fold :: config.folds])
    else:
        held = set(order[: int(len(subjects) * config.validation_fraction)])
        if not held and config.validation_fraction > 0:
            warn(
                f"no validation case: validation_fraction is {config.validation_fraction} of "
                f"{len(subjects)} subject(s); the last epoch is kept"
            )
    # In the order of the shuffle, in which training draws them.
    by_subject = [[i for i, c in enumerate(cases) if c.subject == name] for name in subjects]
    training = [i for s in order if s not in held for i in by_subject[s]]
    return training, [i for s in order if s in held for i in by_subject[s]]


def _from_file(cases: Sequence[Case], path: Path, fold: int) -> Split:
    kind = 'nnU-Net\'s splits_final.json: a list of {"train": [...], "val": [...]}'
    try:
        splits = read_json(path, kind)
    except InputError as error:
        raise InputError(path, f"is no file of splits: {error.problem}", error.remedy) from error
    parts = [_names(path, number, one, kind) for number, one in enumerate(_listed(splits))]
    if not parts:
        raise InputError(path, "is no file of splits: it holds no list of them", f"expected {kind}")
    if fold >= len(parts):
        raise InputError("fold", f"is {fold}", f"expected below the {len(parts)} splits of {path}")
    chosen = parts[fold]
    both = set(chosen["train"]) & set(chosen["val"])
    if both:
        raise InputError(path, f"has {min(both)} in train and in val", "leave it in one")
    for side, names in chosen.items():
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise InputError(path, f"has {name} {count} times in {side}", "leave it in once")
    places = {case.name: index for index, case in enumerate(cases)}
    absent = [name for name in (*chosen["train"], *chosen["val"]) if name not in places]
    if absent:
        warn(f"{len(absent)} case(s) listed in {path} were not found: {', '.join(absent[:5])}")
    unused = places.keys() - {*chosen["train"], *chosen["val"]}
    if unused:
        warn(f"{len(unused)} case(s) are not in {path}: {', '.join(sorted(unused)[:5])}")
    training, validation = (
        [places[name] for name in chosen[kind] if name in places] for kind in ("train", "val")
    )
    if not training:
        raise InputError(path, f"has no usable case to train on in split {fold}", "correct it")
    if chosen["val"] and not validation:
        warn(f"{path}: no case of val is there, so none validates; the last epoch is kept")
    shared = {cases[i].subject for i in training} & {cases[i].subject for i in validation}
    if shared:
        warn(f"{path}: {len(shared)} subject(s) are in train and in val: {min(shared)}")
    return training, validation


def _listed(splits: Any) -> list[Any]:
    return splits if isinstance(splits, list) else []


def _names(path: Path, number: int, one: Any, kind: str) -> dict[str, list[str]]:
    """The names of one split, by side."""
    sides = {side: one.get(side) if isinstance(one, dict) else None for side in ("train", "val")}
    for side, names in sides.items():
        fits = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
        if not fits:
            problem = f"is no file of splits: split {number} has no list of names in {side}"
            raise InputError(path, problem, f"expected {kind}")
    return {side: [str(name) for name in names or ()] for side, names in sides.items()}


def save_split(path: Path, cases: Sequence[Case], parts: Split) -> None:
    """Write a split in the format of nnU-Net's ``splits_final.json``, so that it can be used again.

    Args:
        path: the file, written whole.
        cases: those that were split.
        parts: the result of :func:`split`.
    """
    train, validation = ([cases[index].name for index in part] for part in parts)
    text = json.dumps([{"train": train, "val": validation}], indent=1)
    write_whole(path, lambda temporary: temporary.write_text(text))

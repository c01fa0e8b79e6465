# SPDX-License-Identifier: Apache-2.0
"""Tables of a study: every arm, and its difference to the backbone, subject by subject."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.protocol import ARMS, BASELINE
from grcsf_kernels.engine.evaluation.bootstrap import interval, sensitivity_by_size

MEASURES = ("dice", "lesion_f1", "sensitivity", "precision", "absolute_volume_difference")

Runs = dict[str, dict[int, dict[str, Any]]]  # by arm and seed: what run_arm saves


def load_runs(out: Path) -> Runs:
    """The results of a folder, arms in the protocol's order; an arm without one is left out."""
    found: Runs = {}
    for arm in ARMS:
        for path in sorted((Path(out) / "runs").glob(f"{arm}-[0-9]*.json")):
            run = json.loads(path.read_text())
            found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def by_subject(runs: dict[int, dict[str, Any]], measure: str) -> dict[str, float]:
    """A measure of each subject, the mean over seeds."""
    first = next(iter(runs.values()))
    return {
        name: float(np.mean([_value(run["cases"][name], measure) for run in runs.values()]))
        for name in first["cases"]
    }


def _value(case: dict[str, Any], measure: str) -> float:
    if measure == "absolute_volume_difference":
        return abs(case["volume_difference"]) / 1000  # mm^3 to ml
    return case[measure]


def describe(runs: Runs) -> dict[str, dict[str, Any]]:
    """By arm: each measure's mean over subjects with its interval, and ``found``.

    ``found`` is the share of lesions found over all seeds, by class of size, with its interval over
    subjects.
    """
    table: dict[str, dict[str, Any]] = {}
    for arm, seeds in runs.items():
        row: dict[str, Any] = {
            measure: mean_of(list(by_subject(seeds, measure).values())) for measure in MEASURES
        }
        subjects = next(iter(seeds.values()))["lesions"]
        lesions = [
            [lesion for run in seeds.values() for lesion in run["lesions"][subject]]
            for subject in subjects
        ]
        row["found"] = {
            class_name(size["from"], size["to"]): {
                "lesions": size["lesions"],
                "mean": size["sensitivity"],
                "interval": size["interval"],
            }
            for size in sensitivity_by_size(lesions)
            if size["lesions"]
        }
        table[arm] = row
    return table


def class_name(low: float, high: float | None) -> str:
    """Of a class of lesion size in mm^3: ``100 to 1000``, ``1000 and more``."""
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def differences(
    runs: Runs, pairs: Iterable[tuple[str, str]] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences between arms, over the seeds that both have.

    Args:
        runs: of :func:`load_runs`.
        pairs: of arms, the first less the second; None: every arm less the backbone.

    Returns:
        By ``"first - second"`` and measure: ``mean`` over subjects, its 95 % ``interval`` by
        bootstrap over subjects (each the mean over seeds), ``seeds``: the mean of each seed, and
        ``clear``: the interval leaves out 0 and all seeds have the same sign.
    """
    if pairs is None:
        pairs = [(arm, BASELINE) for arm in runs if arm != BASELINE]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for first, second in pairs:
        if first not in runs or second not in runs:
            continue
        seeds = sorted(set(runs[first]) & set(runs[second]))
        if not seeds:
            continue
        rows = {}
        for measure in MEASURES:

            def paired(
                chosen: list[int],
                measure: str = measure,
                first: str = first,
                second: str = second,
            ) -> list[float]:
                one, other = (
                    by_subject({seed: runs[arm][seed] for seed in chosen}, measure)
                    for arm in (first, second)
                )
                return [one[name] - other[name] for name in one]

            row = mean_of(paired(seeds))
            row["seeds"] = {seed: float(np.mean(paired([seed]))) for seed in seeds}
            row["clear"] = _is_clear(row)
            rows[measure] = row
        table[f"{first} - {second}"] = rows
    return table


def _is_clear(row: dict[str, Any]) -> bool:
    if row["interval"] is None:
        return False
    low, high = row["interval"]
    signs = {value > 0 for value in row["seeds"].values()}
    return (low > 0 or high < 0) and len(signs) == 1


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """``mean`` over subjects, and its 95 % bootstrap ``interval``, as JSON has it."""
    bounds = interval(np.mean, values)
    return {
        "mean": float(np.mean(values)),
        "interval": None if bounds is None else list(bounds),
    }


def with_interval(row: dict[str, Any], *, signed: bool = False) -> str:
    """A mean and its interval as text."""
    sign = "+" if signed else ""
    digits = 1 if abs(row["mean"]) >= 10 else 3
    text = f"{row['mean']:{sign}.{digits}f}"
    if row["interval"]:
        low, high = row["interval"]
        text += f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return text

# SPDX-License-Identifier: Apache-2.0
"""Tables of a study: every arm, and its difference to the backbone, subject by subject."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import ranking
from benchmarks.study.protocol import ARMS, BASELINE
from grcsf_kernels.engine.statistics import LESION_SIZES, interval

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
    """By arm: each measure's mean over subjects, its interval, and the mean of each seed."""
    table: dict[str, dict[str, Any]] = {}
    for arm, seeds in runs.items():
        row: dict[str, Any] = {}
        for measure in MEASURES:
            row[measure] = _summary(list(by_subject(seeds, measure).values()))
            row[measure]["seeds"] = {
                seed: float(np.mean(list(by_subject({seed: run}, measure).values())))
                for seed, run in seeds.items()
            }
        row["found"] = _sensitivities(seeds.values())
        for cost in ("parameters", "training_seconds", "prediction_seconds", "resident_mib"):
            row[cost] = float(np.median([run[cost] for run in seeds.values()]))
        table[arm] = row
    return table


def _sensitivities(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Share of lesions found, over all seeds, by size; the interval is over subjects."""
    counts: dict[str, dict[str, list[int]]] = {}
    for run in runs:
        for subject, lesions in run["lesions"].items():
            for volume, hit in lesions:
                of = counts.setdefault(_class(volume), {}).setdefault(subject, [0, 0])
                of[0] += hit
                of[1] += 1
    table = {}
    for low, high in zip(LESION_SIZES, (*LESION_SIZES[1:], math.inf), strict=True):
        name = ranking.class_name(low, high)
        if name in counts:
            hits, lesions = (list(column) for column in zip(*counts[name].values(), strict=True))
            bounds = interval(_share, hits, lesions)
            table[name] = {
                "lesions": sum(lesions),
                "mean": sum(hits) / sum(lesions),
                "interval": None if bounds is None else list(bounds),
            }
    return table


def _class(volume: float) -> str:
    edges = (*LESION_SIZES, math.inf)
    index = int(np.searchsorted(edges, volume, side="right")) - 1
    return ranking.class_name(edges[index], edges[index + 1])


def _share(hits: Any, lesions: Any, axis: int) -> Any:
    return hits.sum(axis) / lesions.sum(axis)


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

            row = _summary(paired(seeds))
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


def _summary(values: list[float], statistic: Callable[..., Any] = np.mean) -> dict[str, Any]:
    bounds = interval(statistic, values)
    return {
        "mean": float(statistic(values)),
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

# SPDX-License-Identifier: Apache-2.0
"""Means, medians and bootstrap intervals over cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

LESION_SIZES = (0.0, 100.0, 1000.0)  # mm^3: where the classes of size begin
_RESAMPLES = 2000

Row = Mapping[str, float | None]


def interval(
    statistic: Callable[..., Any], *samples: Sequence[float]
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of ``statistic``, the same on every call.

    Args:
        statistic: of the samples, along the axis given as ``axis``.
        samples: values by case; of several, the same cases are drawn together.

    Returns:
        Its bounds; None for fewer than two cases.
    """
    from scipy.stats import bootstrap

    if len(samples[0]) < 2:
        return None
    result = bootstrap(
        tuple(np.asarray(sample, float) for sample in samples),
        statistic,
        n_resamples=_RESAMPLES,
        batch=100,  # 2,000 cases in 2,000 resamples at once would take hundreds of megabytes
        paired=True,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Each measure over the cases where it is defined.

    Args:
        rows: the measures of each case, by name; None where one is not defined.

    Returns:
        By measure: ``count`` of the cases where it is defined, ``mean``, ``median``, and their
        ``mean_interval`` and ``median_interval`` (:func:`interval`); None without enough cases.
    """
    summary = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        summary[name] = {
            "count": len(values),
            "mean": float(np.mean(values)) if values else None,
            "mean_interval": _bounds(interval(np.mean, values)),
            "median": float(np.median(values)) if values else None,
            "median_interval": _bounds(interval(np.median, values)),
        }
    return summary


def sensitivity_by_size(cases: Iterable[Sequence[tuple[float, bool]]]) -> list[dict[str, Any]]:
    """Share of lesions that were found, by their size.

    Args:
        cases: for each case, volume in mm^3 and whether it was found, of every lesion of the label.

    Returns:
        For each class of size ``from`` (included) and ``to`` in mm^3 (None: no bound), ``lesions``,
        ``found``, ``sensitivity`` (None without a lesion) and its ``interval`` over the cases that
        have a lesion of that size.
    """

    def share(found: Any, lesions: Any, axis: int) -> Any:
        return found.sum(axis) / lesions.sum(axis)

    cases = list(cases)
    rows = []
    for low, high in itertools.pairwise((*LESION_SIZES, math.inf)):
        hits = [[hit for volume, hit in case if low <= volume < high] for case in cases]
        found, lesions = [sum(h) for h in hits if h], [len(h) for h in hits if h]
        total = sum(lesions)
        rows.append(
            {
                "from": low,
                "to": None if math.isinf(high) else high,
                "lesions": total,
                "found": sum(found),
                "sensitivity": sum(found) / total if total else None,
                "interval": _bounds(interval(share, found, lesions)),
            }
        )
    return rows


def _bounds(found: tuple[float, float] | None) -> list[float] | None:
    return None if found is None else list(found)  # as JSON has it

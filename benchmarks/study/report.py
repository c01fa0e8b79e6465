# SPDX-License-Identifier: Apache-2.0
"""The report of a study: tables and plots, from the results that there are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report.report import readable_bytes, readable_time, table
from benchmarks.study import causes, comparison, pictures, ranking
from benchmarks.study.protocol import ARMS, BASELINE
from benchmarks.study.runs import Study
from grcsf_kernels.common.atomic_files import write_whole

PAIRS = (
    *((arm, BASELINE) for arm in ARMS if arm != BASELINE),
    ("both", "widened"),
    ("both", "gcu"),
    ("both", "rcu"),
    ("both-complementary", "both"),
    ("gcu-similarity", "gcu"),
)
_SHOWN = "both"  # whose masks are shown
_TITLES = {
    "dice": "Dice",
    "lesion_f1": "lesion F1",
    "sensitivity": "sensitivity",
    "precision": "precision",
    "absolute_volume_difference": "volume difference, ml",
}


def write(study: Study) -> None:
    """Write ``report.md`` and its plots into the study's folder, as far as there are results."""
    out = study.out
    found = comparison.load_runs(out)
    parts = [
        f"# Study at scale {study.scale.name}",
        f"`python -m benchmarks.study --scale {study.scale.name}` makes this from nothing; "
        "what was decided before is in `benchmarks/study/PROTOCOL.md`, and "
        "[docs/study.md](../../../docs/study.md) says what follows. "
        "**The lesions are synthetic.** Brackets are 95 % bootstrap intervals over subjects.",
    ]
    if found:
        described = comparison.describe(found)
        compared = comparison.differences(found, PAIRS)
        counts = {arm: len(seeds) for arm, seeds in found.items()}
        subjects = len(next(iter(next(iter(found.values())).values()))["cases"])
        parts += [
            "## Arms",
            f"{subjects} held-out subjects; each counts with the mean over seeds "
            f"({', '.join(f'{ARMS[arm].title}: {count}' for arm, count in counts.items())}).",
            arms_table(described),
            "## Differences",
            "First less second, subject by subject. *clear*: the interval leaves out 0 and every "
            "seed has its sign.",
            differences_table(compared),
            "## Lesions found, by size",
            sizes_table(described),
        ]
        pictures.draw_differences(compared, out / "differences.png")
        pictures.draw_sizes(described, out / "sizes.png")
        parts += ["![Differences in Dice](differences.png)", "![Lesions found](sizes.png)"]
    areas = load_ranking(out)
    if areas:
        parts += ["## Residual maps", RANKING_TEXT, ranking_table(areas)]
        pictures.draw_ranking(areas, out / "ranking.png")
        parts += ["![ROC AUC](ranking.png)"]
    if (out / "difficulty.json").is_file():
        rated = json.loads((out / "difficulty.json").read_text())
        parts += ["## What intensities alone can do", difficulty_table(rated)]
        if not (out / "subjects.png").is_file():
            pictures.draw_subjects(out / "subjects.png", study.scale.spacing)
        parts += ["![Subjects of both presets, with and without outlines](subjects.png)"]
    costs = load_costs(out)
    if costs:
        parts += ["## Costs", costs_table(costs, found)]
    if (study.run_folder(_SHOWN, 0) / "masks").is_dir() and 0 in found.get(_SHOWN, {}):
        pictures.draw_cases(study, _SHOWN, 0, out / "cases.png")
    if (out / "cases.png").is_file():
        parts += ["## The best, a typical and the worst subject", "![Cases](cases.png)"]
    trials = causes.tables(out)
    if trials:
        parts += ["## Causes, on development subjects", *trials]
    text = "\n\n".join(parts) + "\n"
    write_whole(out / "report.md", lambda temporary: temporary.write_text(text))


RANKING_TEXT = (
    "ROC AUC of lesion voxels against healthy voxels of the same brain, mean over held-out "
    "subjects, each the mean over seeds; lesions by their volume in mm³."
)


def arms_table(described: dict[str, dict[str, Any]]) -> str:
    """Every arm with its measures."""
    return table(
        ["arm", *_TITLES.values()],
        (
            [ARMS[arm].title, *(comparison.with_interval(row[measure]) for measure in _TITLES)]
            for arm, row in described.items()
        ),
    )


def differences_table(compared: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Every pair of arms with its differences; those that are clear in bold."""

    def cell(row: dict[str, Any]) -> str:
        text = comparison.with_interval(row, signed=True)
        return f"**{text}**" if row["clear"] else text

    def seeds(row: dict[str, Any]) -> str:
        return " ".join(f"{value:+.3f}" for value in row["seeds"].values())

    return table(
        [
            "first less second",
            "Dice",
            "Dice by seed",
            "clear",
            "lesion F1",
            "volume difference, ml",
        ],
        (
            [
                pair.replace(" - ", " less "),
                cell(rows["dice"]),
                seeds(rows["dice"]),
                "yes" if rows["dice"]["clear"] else "no",
                cell(rows["lesion_f1"]),
                cell(rows["absolute_volume_difference"]),
            ]
            for pair, rows in compared.items()
        ),
    )


def sizes_table(described: dict[str, dict[str, Any]]) -> str:
    """The share of lesions that each arm finds."""
    names = list(dict.fromkeys(name for row in described.values() for name in row["found"]))
    return table(
        ["arm", *(f"{name} mm³" for name in names)],
        (
            [
                ARMS[arm].title,
                *(
                    comparison.with_interval(row["found"][name]) if name in row["found"] else ""
                    for name in names
                ),
            ]
            for arm, row in described.items()
        ),
    )


def load_ranking(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """AUC by score and class of size: over subjects, each the mean over seeds."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for path in sorted((out / "ranking").glob("*.json")):
        for score, cases in json.loads(path.read_text())["areas"].items():
            for case, areas in cases.items():
                for name, area in areas.items():
                    of = values.setdefault(score, {}).setdefault(case, {})
                    of.setdefault(name, []).append(area)
    return {
        score: ranking.summarize(
            [{name: sum(some) / len(some) for name, some in case.items()} for case in of.values()]
        )
        for score, of in values.items()
    }


def ranking_table(areas: dict[str, dict[str, dict[str, Any]]]) -> str:
    """AUC of each map and of plain scores."""
    names = list(dict.fromkeys(name for classes in areas.values() for name in classes))
    return table(
        ["score", *names],
        (
            [score, *(comparison.with_interval(classes[n]) if n in classes else "" for n in names)]
            for score, classes in areas.items()
        ),
    )


def difficulty_table(rated: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Dice and lesion F1 of plain models."""
    return table(
        ["model", "Dice", "lesion F1"],
        (
            [
                name,
                comparison.with_interval(row["dice"]),
                comparison.with_interval(row["lesion_f1"]),
            ]
            for name, row in rated.items()
        ),
    )


def load_costs(out: Path) -> dict[str, dict[str, Any]]:
    """What :mod:`benchmarks.study.costs` measured, by arm."""
    paths = ((arm, out / "costs" / f"{arm}.json") for arm in ARMS)
    return {arm: json.loads(path.read_text()) for arm, path in paths if path.is_file()}


def costs_table(costs: dict[str, dict[str, Any]], found: comparison.Runs) -> str:
    """Parameters, time and memory of each arm."""

    def lines() -> Iterable[list[str]]:
        for arm, cost in costs.items():
            runs = list(found.get(arm, {}).values())
            seconds = sorted(run["prediction_seconds"] for run in runs)
            yield [
                ARMS[arm].title,
                f"{cost['parameters']:,}",
                f"{readable_time(cost['step_seconds'])} "
                f"({' to '.join(readable_time(value) for value in cost['step_quartiles'])})",
                readable_bytes(cost["allocated_mib"] * 2**20),
                readable_time(seconds[len(seconds) // 2]) if seconds else "",
            ]

    return table(
        [
            "arm",
            "parameters",
            "training step (quartiles)",
            "its memory",
            "prediction a subject, other runs beside it",
        ],
        lines(),
    )

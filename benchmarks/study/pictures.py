# SPDX-License-Identifier: Apache-2.0
"""Plots of a study, and pictures of its subjects and of what an arm made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks.study import comparison, protocol
from benchmarks.study.protocol import ARMS
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.demo.synthetic import make_subject
from grcsf_kernels.engine.evaluation.figures import FigureCase, largest_slice, save_figure

_COLORS = ("#7f7f7f", "#1b7837", "#a6dba0", "#386cb0", "#b2182b", "#e7298a", "#e6ab02")
_CT_WINDOW = (-50, 400)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, metadata={"Software": None}))


def draw_differences(compared: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Mean differences with their intervals; each seed a point."""
    figure, axes = _figure(11, 0.42 * len(compared) + 1.4, 2)
    for axis, measure, title in zip(
        axes, ("dice", "lesion_f1"), ("Dice", "lesion F1"), strict=True
    ):
        axis.axvline(0, color="#999999", linewidth=1)
        for place, rows in enumerate(compared.values()):
            row = rows[measure]
            color = "#b2182b" if row["clear"] else "#386cb0"
            if row["interval"]:
                axis.plot(row["interval"], [place] * 2, color=color, linewidth=2)
            axis.plot(row["mean"], place, "o", color=color)
            seeds = list(row["seeds"].values())
            axis.plot(seeds, [place + 0.22] * len(seeds), "|", color="#555555", markersize=6)
        axis.set_yticks(range(len(compared)), [pair.replace(" - ", " less ") for pair in compared])
        axis.invert_yaxis()
        axis.set_title(f"difference in {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yticklabels([])
    figure.supxlabel("95 % interval over subjects; red: clear; ticks: single seeds", fontsize=9)
    _save(figure, path)


def draw_sizes(described: dict[str, dict[str, Any]], path: Path) -> None:
    """The share of lesions that each arm finds, by size."""
    figure, (axis,) = _figure(8, 3.6)
    names = list(dict.fromkeys(name for row in described.values() for name in row["found"]))
    width = 0.8 / len(described)
    for index, (arm, row) in enumerate(described.items()):
        for place, name in enumerate(names):
            if name not in row["found"]:
                continue
            found = row["found"][name]
            low, high = found["interval"] or (found["mean"], found["mean"])
            axis.bar(
                place - 0.4 + (index + 0.5) * width,
                found["mean"],
                width,
                color=_COLORS[list(ARMS).index(arm)],
                label=ARMS[arm].title if place == 0 else None,
                yerr=[[max(found["mean"] - low, 0)], [max(high - found["mean"], 0)]],
                error_kw={"linewidth": 0.8},
            )
    axis.set_xticks(range(len(names)), [f"{name} mm³" for name in names])
    axis.set_ylabel("share of lesions found")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    _save(figure, path)


def draw_ranking(areas: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """AUC of maps and of plain scores, by lesion size."""
    figure, (axis,) = _figure(8, 3.6)
    names = list(dict.fromkeys(name for classes in areas.values() for name in classes))
    offsets = np.linspace(-0.3, 0.3, len(areas))
    for offset, (score, classes) in zip(offsets, areas.items(), strict=True):
        places = [place for place, name in enumerate(names) if name in classes]
        rows = [classes[names[place]] for place in places]
        bounds = [row["interval"] or [row["mean"]] * 2 for row in rows]
        means = [row["mean"] for row in rows]
        spread = [
            [max(m - low, 0) for m, (low, _) in zip(means, bounds, strict=True)],
            [max(high - m, 0) for m, (_, high) in zip(means, bounds, strict=True)],
        ]
        axis.errorbar(np.add(places, offset), means, yerr=spread, fmt="o", label=score)
    axis.axhline(0.5, color="#999999", linewidth=1)
    axis.set_xticks(range(len(names)), [n if n == "all" else f"{n} mm³" for n in names])
    axis.set_ylabel("ROC AUC")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, ncols=3, loc="outside lower center")
    _save(figure, path)


def draw_subjects(path: Path, spacing: float, count: int = 6) -> None:
    """Development subjects of both presets, without and with the outline of their lesions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * count, 9.6), layout="constrained", dpi=80)
    axes = figure.subplots(4, count, squeeze=False)
    for row, modality in enumerate(("t1", "ct")):
        for column in range(count):
            image, label, _ = make_subject(
                (protocol.DEVELOPMENT, column), spacing, protocol.LESIONS, modality
            )
            place = largest_slice(label)
            low, high = _CT_WINDOW if modality == "ct" else (0, np.percentile(image, 99.8))
            for line in (2 * row, 2 * row + 1):
                axis = axes[line, column]
                axis.imshow(image[:, :, place].T, cmap="gray", vmin=low, vmax=high, origin="lower")
                axis.set_axis_off()
            axes[2 * row + 1, column].contour(
                label[:, :, place].T, levels=[0.5], colors="#00c8ff", linewidths=1
            )
    _save(figure, path)


def draw_cases(study: Any, arm: str, seed: int, path: Path) -> None:
    """The best, a typical and the worst held-out subject of an arm, by Dice."""
    runs = comparison.load_runs(study.out)
    scores = comparison.by_subject({seed: runs[arm][seed]}, "dice")
    ranked = sorted(scores, key=lambda name: -scores[name])
    chosen = {"best": ranked[0], "typical": ranked[len(ranked) // 2], "worst": ranked[-1]}
    rows = []
    for kind, name in chosen.items():

        def read(file: Path) -> Any:
            return np.asarray(nib.load(file).dataobj)  # type: ignore[attr-defined]

        held_out = study.work / "held_out"
        masking = ARMS[arm].masking or "random"
        maps = read(study.maps(seed, masking, "held_out") / f"{name}_residual.nii.gz")
        rows.append(
            FigureCase(
                f"{kind}: {name}",
                read(held_out / f"{name}_image.nii.gz"),
                np.moveaxis(maps, -1, 0),
                read(held_out / f"{name}_label.nii.gz"),
                read(study.run_folder(arm, seed) / "masks" / f"{name}_mask.nii.gz"),
                (study.scale.spacing,) * 3,
                (f"Dice {scores[name]:.2f}",),
            )
        )
    save_figure(
        path,
        rows,
        title=f"Held-out subjects with synthetic lesions: {ARMS[arm].title}, seed {seed}",
    )

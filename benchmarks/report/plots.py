# SPDX-License-Identifier: Apache-2.0
"""Plots of a report: latency against volume size, a roofline, and extra memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

# A peer has one color in every plot; the backends of the library have the strong ones.
_COLORS = {
    "cuda": "#1b7837",
    "triton": "#5aae61",
    "cpu": "#1b7837",
    "automatic": "#1b7837",
    "reference": "#7f7f7f",
    "compile": "#d95f02",
    "autograd": "#a6761d",
    "autograd + compile": "#e6ab02",
    "sdpa": "#386cb0",
    "sdpa + compile": "#80b1d3",
    "flex": "#7570b3",
    "natten": "#e7298a",
    "matrix": "#b2182b",
}
_OURS = ("cuda", "triton", "cpu", "automatic")


def draw(rows: Rows, out: Path) -> list[tuple[str, str]]:
    """Draw what the rows allow; titles and file names. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    found = []
    for title, name, function in (
        ("Latency against volume size", "latency.png", _latency),
        ("Roofline", "roofline.png", _roofline),
        ("Extra memory", "memory.png", _memory),
    ):
        figure = function(rows)
        if figure is not None:
            figure.savefig(out / name, dpi=110, bbox_inches="tight")
            found.append((title, name))
    return found


def _axes(columns: int, lines: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.8 * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _style(peer: str) -> dict[str, Any]:
    width = 2.4 if peer in _OURS else 1.3
    return {"color": _COLORS.get(peer), "linewidth": width, "marker": "o", "markersize": 4}


def _latency(rows: Rows) -> Any:
    """A panel for each operator and direction: time of every peer over the edge of the cube."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    floors: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["family"] != "size":
            continue
        key = row["subject"], row["direction"]
        panels.setdefault(key, defaultdict(list))[row["peer"]].append(
            (row["voxels"], row["median"])
        )
        floors[key][row["voxels"]] = row["floor_seconds"]
    if not panels:
        return None
    subjects = sorted({subject for subject, _ in panels})
    figure, axes = _axes(len(subjects), 2)
    for column, subject in enumerate(subjects):
        for line, direction in enumerate(("forward", "forward+backward")):
            axis = axes[line][column]
            if (subject, direction) not in panels:
                axis.set_axis_off()
                continue
            for peer, points in sorted(panels[subject, direction].items()):
                x, y = zip(*sorted(points), strict=True)
                axis.plot(x, [1e3 * value for value in y], label=peer, **_style(peer))
            floor = sorted(floors[subject, direction].items())
            axis.plot(
                [x for x, _ in floor],
                [1e3 * y for _, y in floor],
                "k:",
                label="floor (bytes over copy bandwidth)",
            )
            axis.set(xscale="log", yscale="log", title=f"{subject} {direction}")
            edges = sorted({round(x ** (1 / 3)) for x, _ in floor})
            axis.set_xticks([edge**3 for edge in edges], [f"{edge}³" for edge in edges])
            axis.minorticks_off()
            axis.set(xlabel="voxels", ylabel="ms")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    return figure


def _roofline(rows: Rows) -> Any:
    """Arithmetic done over time, against arithmetic for each byte that has to move."""
    shown = [row for row in rows if row["family"] == "size" and row.get("flops")]
    if not shown:
        return None
    largest = {
        key: max(row["voxels"] for row in shown if (row["subject"], row["peer"]) == key)
        for key in {(row["subject"], row["peer"]) for row in shown}
    }
    figure, axes = _axes(1)
    axis = axes[0][0]
    figure.set_size_inches(7, 5)
    bandwidth, rate = shown[0]["copy_bandwidth"], shown[0]["arithmetic_rate"]
    intensities = [row["flops"] / row["floor_bytes"] for row in shown]
    span = [min(intensities) / 3, max(max(intensities), rate / bandwidth) * 3]
    axis.plot(
        [span[0], rate / bandwidth, span[1]],
        [span[0] * bandwidth / 1e9, rate / 1e9, rate / 1e9],
        "k-",
        linewidth=1,
        label="copy bandwidth, then float32 matrix product",
    )
    markers = {"residual_map": "s", "gcu": "o", "rcu": "^"}
    for row in shown:
        if row["direction"] != "forward":
            continue
        if row["voxels"] != largest[row["subject"], row["peer"]]:
            continue
        axis.plot(
            row["flops"] / row["floor_bytes"],
            row["flops"] / row["median"] / 1e9,
            markers.get(row["subject"], "x"),
            color=_COLORS.get(row["peer"]),
            label=f"{row['subject']}: {row['peer']}",
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte that has to move",
        ylabel="Gflop/s (of the fewest operations known)",
        title="forward, the largest volume measured",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _memory(rows: Rows) -> Any:
    """Bars: peak extra memory of every peer over the bytes of the largest argument's floor."""
    shown = [row for row in rows if row["family"] == "size"]
    if not shown:
        return None
    subjects = sorted({row["subject"] for row in shown})
    figure, axes = _axes(len(subjects))
    for axis, subject in zip(axes[0], subjects, strict=True):
        own = [row for row in shown if row["subject"] == subject]
        # The largest volume that most peers reach.
        counts = defaultdict(int)
        for row in own:
            counts[row["voxels"]] += 1
        voxels = max(counts, key=lambda size: (counts[size], size))
        bars = [row for row in own if row["voxels"] == voxels]
        bars.sort(key=lambda row: (row["direction"], row["peak_extra_bytes"]))
        names = [
            f"{row['peer']}{' (training)' if row['direction'] != 'forward' else ''}" for row in bars
        ]
        values = [row["peak_extra_bytes"] / 1e6 for row in bars]
        colors = [_COLORS.get(row["peer"], "#444444") for row in bars]
        axis.barh(range(len(bars)), values, color=colors)
        axis.set_yticks(range(len(bars)), names, fontsize=7)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.0f}", va="center", fontsize=7)
        axis.margins(x=0.15)
        axis.set(title=f"{subject} {bars[0]['case']}", xlabel="MB beyond the inputs")
    return figure

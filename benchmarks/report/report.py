# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report FOLDER...``: tables and plots of one or several result folders.

Writes ``report.md`` and the plots into the last folder that is named (or ``--out``).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.work import exponent
from benchmarks.report import plots

Rows = list[dict[str, Any]]


def _readable(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """Three digits with the largest unit that fits."""
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    digits = 2 if value < 10 * size else 1 if value < 100 * size else 0
    return f"{value / size:.{digits}f} {unit}"


def readable_time(seconds: float) -> str:
    """Such as ``13.9 ms``."""
    return _readable(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def readable_bytes(count: float | None) -> str:
    """Such as ``113 MB``; nothing where it was not measured."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    return "" if count is None else _readable(count, units)


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    names = list(header)
    text = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text)


def _times(row: dict[str, Any]) -> str:
    half = (row["q3"] - row["q1"]) / 2 / row["median"]
    return f"{readable_time(row['median'])} ± {100 * half:.0f} %"


def case_table(rows: Rows) -> str:
    """The peers of one case, the fastest first."""
    rows = sorted(rows, key=lambda row: row["median"])
    on_gpu = any(row["launches"] for row in rows)
    with_floor = any("floor_seconds" in row for row in rows)
    header = ["peer", "median", "over the fastest"]
    header += ["share of the floor"] if with_floor else []
    header += ["extra memory", *(["kernels"] if on_gpu else ["resident"]), "rounds"]
    lines = []
    for row in rows:
        line = [row["peer"], _times(row), f"{row['median'] / rows[0]['median']:.3g}"]
        line += [f"{100 * row['share_of_floor']:.3g} %"] if with_floor else []
        line.append(readable_bytes(row["peak_extra_bytes"]))
        line.append(str(row["launches"]) if on_gpu else readable_bytes(row["peak_resident_bytes"]))
        lines.append([*line, str(row["rounds"])])
    return table(header, lines)


def growth_table(rows: Rows) -> str:
    """The fitted exponent of time over voxels for each operator and peer."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["family"] in ("scaling", "global") and row["direction"] == "forward":
            name = row["subject"] + (" global" if row["family"] == "global" else "")
            points[name, row["peer"]].append((row["voxels"], row["median"]))
    lines = []
    for (subject, peer), found in sorted(points.items()):
        slope = exponent(found)
        if slope is None:
            continue
        smallest, largest = min(found)[0], max(found)[0]
        span = f"{round(smallest ** (1 / 3))}³ to {round(largest ** (1 / 3))}³"
        lines.append([subject, peer, f"{slope:.2f}", span, str(len(found))])
    return table(["operator", "peer", "exponent", "volumes", "points"], lines)


def _absent(entries: Rows) -> str:
    """Peers that were not measured, by reason."""
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        where = f"{entry['subject']} {entry['case']} {entry['direction']}"
        grouped[entry["peer"], entry["reason"]].append(where)
    lines = []
    for (peer, reason), places in sorted(grouped.items()):
        shown = "; ".join(places[:3]) + (f"; and {len(places) - 3} more" if places[3:] else "")
        lines.append([peer, reason, shown])
    return table(["peer", "reason", "where"], lines)


def _heading(content: dict[str, Any]) -> str:
    machine, commit = content["machine"], content["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with uncommitted changes" if commit.get("dirty") else ""
    return "\n".join(
        [
            f"- device: {machine['device']}, {machine['threads']} threads on the host",
            f"- versions: Python {machine['python_version']}, {versions}",
            f"- commit: {commit.get('id', 'unknown')[:12]}{dirty}",
            f"- copy bandwidth: {content['copy_bandwidth'] / 1e9:.1f} GB/s, read and written",
        ]
    )


def write_report(content: dict[str, Any], out: Path) -> Path:
    """``report.md`` and its plots in ``out``."""
    rows: Rows = content["rows"]
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    text = [
        f"# {content['machine']['device']}",
        "Made by `python -m benchmarks.report`. How it is measured: docs/benchmarks.md.",
        _heading(content),
    ]
    if content["quick"]:
        text.append("**Quick run**: few rounds.")
    for title, name in plots.draw(rows, out):
        text += [f"## {title}", f"![{title}]({name})"]
    growth = growth_table(rows)
    if growth.count("\n") > 1:
        text += ["## How the time grows with the voxels", growth]
    text.append("## Every case")
    for group, members in groups.items():
        text += [f"### {group}", case_table(members)]
    if content["absent"]:
        text += ["## Not measured", _absent(content["absent"])]
    path = out / "report.md"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n\n".join(text) + "\n")
    temporary.replace(path)
    return path


def side_by_side(contents: list[dict[str, Any]]) -> str:
    """The medians of several folders, row by row."""
    names = [content["folder"].name for content in contents]
    medians: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for content in contents:
        for row in content["rows"]:
            medians[row["group"], row["peer"]][content["folder"].name] = row["median"]
    lines = [
        [group, peer, *(readable_time(found[n]) if n in found else "" for n in names)]
        for (group, peer), found in sorted(medians.items())
    ]
    return table(["case", "peer", *names], lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the report; the exit status is 1 where a folder has no results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        contents = [results.load(folder) for folder in options.folders]
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    out = options.out or options.folders[-1]
    out.mkdir(parents=True, exist_ok=True)
    path = write_report(contents[-1], out)
    if len(contents) > 1:
        with path.open("a") as file:
            file.write("\n## Side by side\n\n" + side_by_side(contents) + "\n")
    sys.stdout.write(f"{path}\n")
    return 0

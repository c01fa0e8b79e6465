# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report.compare OLD NEW``: what got slower, the noise taken into account.

A row got slower where three things hold: the median grew by more than ``--tolerance``; the new
lower quartile lies above the old upper one, so that the samples hardly overlap; and the growth is
still there after it is divided by that of the copy bandwidth, so that a machine that was slower as
a whole is not blamed on an operator. A row whose memory grew by more than ``--memory-tolerance``
is named as well: memory has no noise.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.report.report import readable_bytes, readable_time


@dataclass(frozen=True)
class Change:
    """A row that changed.

    Attributes:
        name: case and peer.
        kind: ``slower``, ``faster`` or ``more memory``.
        ratio: new over old.
        text: both values, to read.
    """

    name: str
    kind: str
    ratio: float
    text: str


def _rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['group']}: {row['peer']}": row for row in content["rows"]}


def compare(
    old: dict[str, Any],
    new: dict[str, Any],
    tolerance: float = 0.1,
    memory_tolerance: float = 0.02,
) -> list[Change]:
    """What changed between two result folders, among the rows that both have."""
    # Above 1 where this machine was slower than the one (or the hour) of the old results.
    machine = max(1.0, old["copy_bandwidth"] / new["copy_bandwidth"])
    before, after = _rows(old), _rows(new)
    changes = []
    for name in sorted(before.keys() & after.keys()):
        was, now = before[name], after[name]
        ratio = now["median"] / was["median"]
        text = f"{readable_time(was['median'])} → {readable_time(now['median'])}"
        if ratio / machine > 1 + tolerance and now["q1"] > was["q3"]:
            changes.append(Change(name, "slower", ratio, text))
        elif 1 / ratio > 1 + tolerance and now["q3"] < was["q1"]:
            changes.append(Change(name, "faster", ratio, text))
        memory = [row["peak_extra_bytes"] for row in (was, now)]
        # A page more or less is no change.
        if memory[1] > memory[0] * (1 + memory_tolerance) + 4096:
            text = f"{readable_bytes(memory[0])} → {readable_bytes(memory[1])}"
            changes.append(Change(name, "more memory", memory[1] / max(memory[0], 1), text))
    return changes


def main(arguments: list[str] | None = None) -> int:
    """Print the changes; the exit status is 1 where something got slower or larger."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.compare", description=__doc__
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="of time (default 0.1)")
    parser.add_argument("--memory-tolerance", type=float, default=0.02, help="(default 0.02)")
    options = parser.parse_args(arguments)
    try:
        old, new = results.load(options.old), results.load(options.new)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    devices = old["machine"]["device"], new["machine"]["device"]
    if devices[0] != devices[1]:
        sys.stderr.write(f"the results are from {devices[0]} and from {devices[1]}\n")
        return 2
    changes = compare(old, new, options.tolerance, options.memory_tolerance)
    common = _rows(old).keys() & _rows(new).keys()
    for change in sorted(changes, key=lambda change: (change.kind, -change.ratio)):
        sys.stdout.write(f"{change.kind:<12} {change.ratio:6.2f} x  {change.name}: {change.text}\n")
    worse = [change for change in changes if change.kind != "faster"]
    bandwidths = [content["copy_bandwidth"] / 1e9 for content in (old, new)]
    sys.stdout.write(
        f"{len(common)} rows compared, {len(worse)} worse; copy bandwidth "
        f"{bandwidths[0]:.1f} → {bandwidths[1]:.1f} GB/s\n"
    )
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())

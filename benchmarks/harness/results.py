# SPDX-License-Identifier: Apache-2.0
"""Result files: where they are, what is in them, and the machine that they are from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "results"

_STATS = ("min", "max", "mean", "median", "q1", "q3", "iqr", "stddev", "rounds")
_PACKAGES = ("torch", "triton", "monai", "natten", "numpy", "grcsf-kernels")


def device_name(device: str) -> str:
    """The device as folders are named: ``cpu-amd-epyc-2cores``, ``nvidia-h200``."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name(0))
    model = "unknown"
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    if found:
        model = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", found[1])
    return f"cpu-{_slug(model)}-{torch.get_num_threads()}threads"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_folder(device: str) -> Path:
    """``benchmarks/results/<device>-<date>``."""
    return FOLDER / f"{device_name(device)}-{datetime.date.today().isoformat()}"


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    found = {"cuda": torch.version.cuda or "none"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def free_memory(device: str) -> int:
    """Bytes that a call could take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(found[1]) * 1024 if found else pages // 2


def slim(output: dict[str, Any]) -> None:
    """Drop what pytest-benchmark writes and nobody reads; add what each row is compared with."""
    rows = []
    for bench in output["benchmarks"]:
        stats = {name: bench["stats"][name] for name in _STATS}
        stats = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in stats.items()}
        rows.append({"name": bench["name"], "group": bench["group"], **bench["extra_info"]} | stats)
        if rows[-1].get("floor_seconds"):
            share = rows[-1]["floor_seconds"] / stats["median"]
            rows[-1]["share_of_floor"] = float(f"{share:.4g}")
    output["benchmarks"] = rows
    _set_side_by_side(rows)


def _set_side_by_side(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["times_slower_than"] = {
            other["peer"]: float(f"{row['median'] / other['median']:.4g}")
            for other in rows
            if other["group"] == row["group"] and other is not row
        }


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with those rows of ``old`` that it does not measure, or leave out, itself."""

    def key(entry: dict[str, Any]) -> tuple[str, ...]:
        names = ("subject", "case", "family", "direction", "peer")
        return tuple(entry[name] for name in names)

    done = {key(entry) for entry in (*new["benchmarks"], *new["absent"])}
    merged = dict(new)
    for part in ("benchmarks", "absent"):
        merged[part] = [entry for entry in old[part] if key(entry) not in done] + new[part]
    _set_side_by_side(merged["benchmarks"])
    return merged


def load(folder: Path) -> dict[str, Any]:
    """All results of a folder as one: ``rows``, ``absent``, ``machine``, ``commit``, ``quick``.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in Path(folder).glob("*.json") if _is_result(path))
    if not files:
        raise FileNotFoundError(f"{folder} has no results of pytest benchmarks/")
    merged: dict[str, Any] = {"rows": [], "absent": [], "quick": False, "folder": Path(folder)}
    bandwidths = []
    for path in files:
        content = json.loads(path.read_text())
        merged["rows"] += content["benchmarks"]
        merged["absent"] += content["absent"]
        merged["quick"] |= content["quick"]
        merged["machine"] = content["machine_info"]
        merged["commit"] = content["commit_info"]
        bandwidths.append(content["roofs"]["copy_bandwidth"])
    merged["copy_bandwidth"] = statistics.median(bandwidths)
    return merged


def _is_result(path: Path) -> bool:
    content = json.loads(path.read_text())
    return isinstance(content, dict) and {"benchmarks", "absent", "roofs"} <= content.keys()

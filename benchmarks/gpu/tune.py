# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.tune``: choose the Triton kernels' launch parameters on this GPU.

For each row of the tables that this GPU would use: alternatives for one parameter after the other
(half and double tiles, warps, stages), each checked before it is timed, the fastest kept and
written to the table in ``--out`` with the GPU's name and the date. Every table is whole at any
time, so that a run can be stopped. ``--dry-run`` lists what would be tried, and needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernel_cases import Call, calls
from benchmarks.gpu.kernels import selectable, tables_of
from benchmarks.harness import measure, results
from benchmarks.harness.rows import BOUNDS, worst_error
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.dispatch import OPERATORS
from grcsf_kernels.triton import launch

Row = dict[str, Any]

_WARPS = (2, 4, 8, 16)
_STAGES = (1, 2, 3, 4)
# Sizes that are tiles; others (numbers of nodes, say) are part of a kernel's accuracy or memory.
_TILES = ("BLOCK", "TILE", "DRAWS", "CHUNK")
_LEAST_TILE = 16
_ROUNDS = 15
# What is not faster by this much is noise.
_GAIN = 0.97
# Reference attention in larger patches takes too long.
_LARGEST_CHECKED_PATCH = 16


def alternatives(name: str, value: int) -> list[int]:
    """Other values of a parameter that are worth a try."""
    if name == "num_warps":
        near = [warps for warps in _WARPS if value // 2 <= warps <= value * 2]
        return [warps for warps in near if warps != value]
    if name == "num_stages":
        return [stages for stages in _STAGES if stages != value]
    if not name.startswith(_TILES) or value < 1 or value & (value - 1):
        return []
    least = 1 if name == "DRAWS" else _LEAST_TILE
    return [size for size in (value // 2, value * 2) if size >= least]


def search(
    start: dict[str, int], cost: Callable[[dict[str, int]], float]
) -> tuple[dict[str, int], float, float]:
    """The cheapest parameters that were found, their cost, and that of ``start``.

    One parameter after the other, the best so far kept; ``inf`` is the cost of what can't run.
    """
    best = dict(start)
    first = least = cost(best)
    for name in start:
        for value in alternatives(name, start[name]):
            candidate = best | {name: value}
            found = cost(candidate)
            if found < least * _GAIN:
                best, least = candidate, found
    return best, least, first


def merged(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with ``row`` in the place of the one for the same launches, or at their end."""
    keys = ("kernel", "architecture", "dtype", "shape")
    same = [all(old[key] == row[key] for key in keys) for old in rows]
    if any(same):
        return [row if equal else old for old, equal in zip(rows, same, strict=True)]
    return [*rows, row]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """A table of launch parameters, one row a line, whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(path, lambda temporary: temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n'))


def use_tables(folder: Path) -> None:
    """Kernels take their parameters from ``folder`` from now on."""
    os.environ["GRCSF_TRITON_PARAMETERS"] = str(folder)
    launch.table.cache_clear()
    launch._row.cache_clear()


def work_list(operators: Sequence[str], architecture: int) -> Iterator[tuple[str, Row, Call]]:
    """Tables, rows that the architecture uses (float64 aside), and the first call of each."""
    for operator in operators:
        users: dict[str, Call] = {}
        for call in calls(operator):
            for name, row in call.record(architecture).rows:
                users.setdefault(f"{name} {json.dumps(row)}", call)
        for name in tables_of(operator):
            for row in selectable(launch.table(launch.table_path(name)), architecture):
                user = users.get(f"{name} {json.dumps(row)}")
                if user is not None:
                    yield name, row, user


def _seconds(run: Callable[[], object]) -> float:
    """Median of several runs on the GPU."""
    measure.synchronize("cuda")
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    measure.synchronize("cuda")
    taken = []
    for _ in range(_ROUNDS):
        measure.hide_launches("cuda", host)
        start = measure.CudaStamp()
        run()
        taken.append(measure.CudaStamp() - start)
    return statistics.median(taken)


def _named(found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {f"result {i}": tensor for i, tensor in enumerate(found) if tensor is not None}


def _expected(call: Call, tensors: Sequence[Any]) -> dict[str, Tensor]:
    """What the call gives: on the reference, or where that takes too long on the row in use."""
    patch = call.case.patch
    quadratic = call.case.subject == "rcu" and (patch is None or patch > _LARGEST_CHECKED_PATCH)
    package = "triton" if quadratic else "reference"
    return _named(
        call.run(importlib.import_module(f"grcsf_kernels.{package}.{call.case.subject}"), tensors)
    )


def tune_row(folder: Path, name: str, row: Row, call: Call) -> tuple[Row, float, float]:
    """The best row of the table ``name`` for ``call``, its seconds, and those of ``row``."""
    torch.manual_seed(0)
    rows = json.loads((folder / f"{name}.json").read_text())["rows"]
    module = importlib.import_module(f"grcsf_kernels.triton.{call.case.subject}")
    tensors = call.tensors("cuda")
    use_tables(folder)
    expected = _expected(call, tensors)
    bound = BOUNDS[call.case.dtype] * (10 if call.case.subject == "residual_map" else 1)
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.glob("*.json"):
            (Path(scratch) / path.name).write_text(path.read_text())

        def cost(parameters: dict[str, int]) -> float:
            write_table(
                Path(scratch) / f"{name}.json", merged(rows, row | {"parameters": parameters})
            )
            use_tables(Path(scratch))
            try:
                worst_error(_named(call.run(module, tensors)), expected, bound)
                return _seconds(lambda: call.run(module, tensors))
            except AssertionError as problem:
                sys.stdout.write(f"  {parameters}: {problem}\n")
            except Exception as problem:  # too many resources, or a tile that a kernel can't have
                sys.stdout.write(f"  {parameters}: {type(problem).__name__}\n")
            return float("inf")

        best, least, first = search(row["parameters"], cost)
    use_tables(folder)
    source = f"{results.device_name('cuda')} {date.today().isoformat()}"
    return row | {"parameters": best, "source": source}, least, first


def _candidates(row: Row) -> str:
    """The alternatives of a row as one reads them."""
    found = {name: alternatives(name, value) for name, value in row["parameters"].items()}
    return ", ".join(f"{name} {row['parameters'][name]} -> {v}" for name, v in found.items() if v)


def main(arguments: list[str] | None = None) -> int:
    """Tune; the exit status is 1 where there is no GPU to tune on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--out", type=Path, help="folder of the tables; default: those in use")
    parser.add_argument("--budget", type=float, default=1800, help="seconds; no row begins after")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried")
    parser.add_argument("--architecture", type=int, default=90, help="of --dry-run without a GPU")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.dry_run:
        sys.stdout.write("tune: torch finds no CUDA device, on which alone kernels can be timed\n")
        return 1
    architecture = options.architecture
    if has_gpu:
        architecture = launch.architecture(torch.empty(0, device="cuda"))
    todo = list(work_list(options.operators, architecture))
    if options.dry_run:
        for name, row, call in todo:
            place = f"{name} {row['kernel']} {row['dtype']} {row['shape']}"
            sys.stdout.write(f"{place} ({call.title}): {_candidates(row)}\n")
        return 0
    folder = options.out or launch.table_path("gcu").parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in {name for name, _, _ in todo}:
        path = launch.table_path(name)
        if not (folder / path.name).exists():
            write_table(folder / path.name, launch.table(path))
    deadline = time.monotonic() + options.budget
    for name, row, call in todo:
        if time.monotonic() > deadline:
            sys.stdout.write("tune: no time left\n")
            break
        own = row | {"architecture": architecture}
        best, least, first = tune_row(folder, name, own, call)
        path = folder / f"{name}.json"
        if least < float("inf"):
            write_table(path, merged(json.loads(path.read_text())["rows"], best))
        sys.stdout.write(
            f"{name} {row['kernel']} {row['dtype']} {row['shape']} ({call.title}): "
            f"{first * 1e6:.0f} -> {least * 1e6:.0f} us with {best['parameters']}\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.kernels``: what the compiler says of Triton kernels, without a GPU.

Collects the launches of forward and backward on tensors without data, compiles each distinct one
ahead of time and reports registers, spills, shared memory and occupancy. The exit status is 1 where
one does not compile, spills, asks for more shared memory than a block can have, or where a row of
the tables of launch parameters is chosen by no call. ``--write docs/kernels.md`` writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.ahead_of_time import Compilation, Compiled, compile_one, limits
from benchmarks.gpu.kernel_cases import DTYPES, Call, calls
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.dispatch import OPERATORS
from grcsf_kernels.triton import launch

# Of which the page has a row a kernel; of the others it has the maxima.
_SHOWN = 90
# Constants of a kernel that are its tile.
_TILE = ("BLOCK", "TILE", "TOKENS", "VALUES", "DRAWS", "CHUNK")

_PAGE = """\
# Triton kernels

What the compiler says of the Triton kernels of `grcsf_kernels/triton`, without a GPU: nothing here
is a measured time. Written by

    python -m benchmarks.gpu.kernels --write docs/kernels.md

which runs forward and backward of every operator on tensors without data, takes down which
kernels they would start, and compiles each for {architectures} (Triton {triton}).

How to read it:

- *registers* of a thread. A multiprocessor has 65,536, so that what takes more than 64 fills it to
  half, and more than 128 to a quarter at most.
- *spills*: bytes of a thread that did not fit into registers. Tests hold them at 0.
- *shared*: bytes of shared memory of a block. One block can have 163 KiB on sm_80 and 227 KiB on
  sm_90 and sm_100, but 99 KiB on the consumer cards of the same years (sm_86, sm_89, sm_120):
  {fits}.
- *warps held*: of the {held} that a multiprocessor can have at once, as many as registers and
  shared memory let in. Kernels that only move data need about a third of them, or several loads a
  thread.
- *tile*: the compile-time sizes that come from the tables of launch parameters
  (`grcsf_kernels/triton/parameters/*.json`).

float64 is compiled too, for correctness alone, and is not listed. Each operator's least bytes to
move are those of its inputs read once and its outputs written once.
"""


@dataclass
class Collected:
    """What one operator's calls would start.

    Attributes:
        operator: its name.
        compilations: distinct ones, each with the first call that asked for it.
        unused: rows of the tables that no call chose, for an architecture that can choose them.
    """

    operator: str
    compilations: dict[Compilation, Call] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def tables_of(operator: str) -> list[str]:
    """Names of the operator's tables: ``rcu`` and ``rcu_direct``, say."""
    folder = launch.table_path(operator).parent
    found = [path.stem for path in folder.glob("*.json")]
    return sorted(name for name in found if name == operator or name.startswith(f"{operator}_"))


def selectable(rows: Sequence[dict[str, Any]], architecture: int) -> Iterator[dict[str, Any]]:
    """The rows that ``architecture`` chooses for some call: newer ones hide older ones."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["architecture"]):
        if launch.INTERPRETER < row["architecture"] <= architecture:
            newest[row["kernel"], row["dtype"], row["shape"]] = row
    yield from newest.values()


def collect(operator: str, architectures: Iterable[int], quick: bool = False) -> Collected:
    """The launches of an operator, and the rows of its tables that none of them uses.

    With ``quick`` a kernel is compiled once for each architecture, dtype and tile; float16 and
    channels-last, which differ little from bfloat16 and contiguous, for one architecture alone.
    float64, which need not be fast, is always so, for one architecture, and not with ``quick``:
    some of its kernels take minutes.
    """
    found = Collected(operator)
    for architecture in architectures:
        chosen: set[str] = set()
        seen: set[Any] = set()
        for call in calls(operator, (*DTYPES, "float64")):
            recorded = call.record(architecture)
            chosen |= {_named(name, row) for name, row in recorded.rows}
            case = call.case
            float64 = case.dtype == "float64"
            rare = case.dtype == "float16" or case.layout != "contiguous"
            if float64 and (quick or architecture != _SHOWN):
                continue
            if quick and rare and architecture != _SHOWN:
                continue
            for started in recorded:
                own = Compilation.of(started, architecture)
                key = (own.kernel, case.dtype, case.layout, tile(own), own.options)
                if not (quick or float64) or key not in seen:
                    seen.add(key)
                    found.compilations.setdefault(own, call)
        for name in tables_of(operator):
            for row in selectable(launch.table(launch.table_path(name)), architecture):
                if _named(name, row) not in chosen:
                    found.unused.append(f"sm_{architecture}: {_named(name, row)}")
    return found


def _named(table: str, row: dict[str, Any]) -> str:
    return f"{table}.json: {json.dumps(row)}"


def _quiet() -> None:
    warnings.filterwarnings("ignore", module="triton")


def compile_all(
    compilations: Sequence[Compilation], jobs: int
) -> Iterator[tuple[Compilation, Compiled]]:
    """Compile in ``jobs`` processes; results come as they are ready, in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        yield from zip(compilations, pool.map(compile_one, compilations), strict=True)


def complaints(compilation: Compilation, compiled: Compiled, call: Call) -> Iterator[str]:
    """What is wrong with a compiled kernel; float64 need only compile."""
    who = f"{compilation.kernel} for sm_{compilation.architecture} ({call.title})"
    if compiled.error:
        yield f"{who} does not compile: {compiled.error}"
    elif call.case.dtype != "float64":
        if compiled.stack:
            yield f"{who} spills {compiled.stack} bytes"
        most = limits(compilation.architecture).shared_of_block
        if compiled.shared > most:
            yield f"{who} asks for {compiled.shared} bytes of shared memory, of {most}"


Result = tuple[Compilation, Compiled, Call]


def tile(compilation: Compilation) -> str:
    """The tile of a kernel as one reads it."""
    sizes = {
        name: value
        for name, value in compilation.named_constants.items()
        if isinstance(value, int) and not isinstance(value, bool) and name.startswith(_TILE)
    }
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def line(compilation: Compilation, compiled: Compiled, call: Call) -> str:
    """One compiled kernel as one reads it."""
    return (
        f"sm_{compilation.architecture} {compilation.kernel}: {compiled.registers} registers, "
        f"{compiled.stack} spilled, {compiled.shared} shared, {compiled.occupancy} warps held, "
        f"{compiled.seconds:.1f} s ({call.title}; {tile(compilation)}; {compiled.warps} warps)\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _main_rows(results: Sequence[Result]) -> Iterator[Sequence[object]]:
    """One row for each kernel, dtype and layout: the launch of the call that comes first."""
    seen = set()
    for compilation, compiled, call in results:
        key = (compilation.kernel, call.case.dtype, call.case.layout)
        if compilation.architecture != _SHOWN or key in seen or call.case.dtype == "float64":
            continue
        seen.add(key)
        yield (
            f"`{compilation.kernel}`",
            call.case.dtype,
            call.case.layout.replace("_", "-"),
            call.case.family,
            tile(compilation),
            compiled.warps,
            compiled.registers,
            compiled.stack,
            f"{compiled.shared:,}",
            compiled.occupancy,
        )


def _most_rows(results: Sequence[Result]) -> Iterator[Sequence[object]]:
    """One row for each kernel and architecture: the worst of all its launches."""
    groups: dict[tuple[str, int], list[Compiled]] = defaultdict(list)
    for compilation, compiled, call in results:
        if call.case.dtype != "float64" and not compiled.error:
            groups[compilation.kernel, compilation.architecture].append(compiled)
    for (kernel, architecture), group in sorted(groups.items()):
        yield (
            f"`{kernel}`",
            f"sm_{architecture}",
            len(group),
            max(one.registers for one in group),
            max(one.stack for one in group),
            f"{max(one.shared for one in group):,}",
            min(one.occupancy for one in group),
        )


def page(results: dict[str, list[Result]]) -> str:
    """``docs/kernels.md``."""
    import triton

    flat = [result for group in results.values() for result in group]
    architectures = sorted({compilation.architecture for compilation, _, _ in flat})
    listed = [(n, c) for n, c, call in flat if call.case.dtype != "float64"]
    too_large = sorted({n.kernel for n, c in listed if c.shared > limits(86).shared_of_block})
    fits = f"not there: {', '.join(f'`{k}`' for k in too_large)}" if too_large else "all fit there"
    text = [
        _PAGE.format(
            architectures=", ".join(f"sm_{a}" for a in architectures),
            triton=triton.__version__,
            fits=fits,
            held=limits(_SHOWN).warps,
        )
    ]
    for operator, group in results.items():
        main = next(call for _, _, call in group)
        forward, both = (f"{size / 1e6:,.0f} MB" for size in main.bytes())
        text.append(f"## {operator}\n\n{main.title}: {forward} forward, {both} with backward.\n")
        text.append(f"On sm_{_SHOWN}, the first call of each kernel, dtype and layout:\n")
        head = ["kernel", "dtype", "layout", "call", "tile", "warps", "registers", "spills"]
        text += [*_table([*head, "shared", "warps held"], _main_rows(group)), ""]
        text.append("Over all calls, the most of each, and the fewest warps held:\n")
        head = ["kernel", "architecture", "launches compiled", "registers", "spills", "shared"]
        text += [*_table([*head, "warps held"], _most_rows(group)), ""]
    return "\n".join(text)


def run(
    operators: Sequence[str], architectures: Sequence[int], jobs: int, quick: bool
) -> tuple[dict[str, list[Result]], list[str]]:
    """Compile everything; results by operator, and what is wrong."""
    results: dict[str, list[Result]] = {}
    wrong: list[str] = []
    for operator in operators:
        start = time.perf_counter()
        collected = collect(operator, architectures, quick)
        wrong += [f"never chosen: {row}" for row in collected.unused]
        results[operator] = []
        for compilation, compiled in compile_all(list(collected.compilations), jobs):
            call = collected.compilations[compilation]
            results[operator].append((compilation, compiled, call))
            wrong += complaints(compilation, compiled, call)
            sys.stdout.write(line(compilation, compiled, call))
            sys.stdout.flush()
        took = time.perf_counter() - start
        kernels = len({compilation.kernel for compilation in collected.compilations})
        sys.stdout.write(
            f"{operator}: {kernels} kernels, {len(results[operator])} compiled in {took:.0f} s\n"
        )
        sys.stdout.flush()
    return results, wrong


def main(arguments: list[str] | None = None) -> int:
    """Compile and report; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--architectures", nargs="+", type=int, default=launch.ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--quick", action="store_true", help="each kernel once for a dtype and tile"
    )
    parser.add_argument("--write", type=Path, help="write the page, docs/kernels.md")
    parser.add_argument("--json", type=Path, help="write all results")
    options = parser.parse_args(arguments)
    # Before anything imports Triton, here and in the processes that compile: its interpreter
    # compiles nothing.
    os.environ["TRITON_INTERPRET"] = "0"
    _quiet()
    results, wrong = run(options.operators, options.architectures, options.jobs, options.quick)
    if options.write:
        text = page(results)
        write_whole(options.write, lambda path: path.write_text(text))
    if options.json:
        rows = [
            {"operator": o, "kernel": n.kernel, "architecture": n.architecture, "call": call.title}
            | {name: getattr(c, name) for name in ("registers", "stack", "shared", "occupancy")}
            | {"float64": call.case.dtype == "float64", "error": c.error}
            for o, group in results.items()
            for n, c, call in group
        ]
        options.json.write_text(json.dumps({"kernels": rows, "wrong": wrong}))
    for complaint in wrong:
        sys.stdout.write(f"WRONG: {complaint}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.cuda_kernels``: what the compiler says of every CUDA kernel.

Reads registers and stack of each kernel out of the built ``_C``; needs no GPU. The exit status is 1
where one has a stack: a thread's local memory, where values go that are spilled.
``--write docs/kernels.md`` writes the page's part on CUDA kernels, for which ``--launches`` names
what ``make emulate`` noted: ``GRCSF_LAUNCHES=launches.json make emulate
TESTS=tests/emulation/test_launches.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.ahead_of_time import occupancy
from grcsf_kernels import native
from grcsf_kernels.common.atomic_files import write_whole

# The page's part on CUDA kernels begins here; what stands before is of ``benchmarks.gpu.kernels``.
MARK = "# CUDA kernels\n"

_PAGE = """\
What the compiler says of the kernels of `csrc/cuda`, without a GPU: nothing here is a measured
time. Read out of the built module (nvcc {compiler}, {architectures}), and written, by

    GRCSF_LAUNCHES=launches.json make emulate TESTS=tests/emulation/test_launches.py
    python -m benchmarks.gpu.cuda_kernels --launches launches.json --write docs/kernels.md

No kernel has a stack, so none spills; tests hold that, and the registers below.

## Launches

Of one call, forward and backward, in bfloat16, on a device of 132 multiprocessors (H100), with
shared memory in bytes of a block. *Warps held* are those that a multiprocessor of sm_90 can have at
once, of 64, for the instance with the most registers (float64 apart).
"""


@dataclass(frozen=True)
class Resources:
    """What one instance of a kernel takes.

    Attributes:
        kernel: the function's name, without ``_kernel``.
        instance: its template arguments.
        architecture: that it was compiled for: 90 for 9.0.
        registers: of a thread.
        stack: bytes of a thread in local memory.
    """

    kernel: str
    instance: str
    architecture: int
    registers: int
    stack: int


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        raise SystemExit("cuobjdump was not found, nor Triton, which brings one") from None
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _output(command: list[str], given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def resources(library: Path) -> list[Resources]:
    """Every kernel of a built module, for every architecture, in order."""
    said = _output(["c++filt"], _output([_cuobjdump(), "-res-usage", str(library)]))
    found = []
    architecture = 0
    kernel = instance = ""
    for line in said.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function .*?(\w+)_kernel(?:<(.*)>)?\(", line):
            kernel = match[1]
            instance = re.sub(r"grcsf::|cuda::|\(anonymous namespace\)::", "", match[2] or "")
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append(Resources(kernel, instance, architecture, int(match[1]), int(match[2])))
    return sorted(set(found), key=lambda r: (r.kernel, r.instance, r.architecture))


def most_registers(found: Iterable[Resources]) -> dict[tuple[str, int], int]:
    """By kernel and architecture, the registers of the instance that has the most, but float64."""
    most: dict[tuple[str, int], int] = defaultdict(int)
    for one in found:
        if "double" in one.instance:
            continue
        most[one.kernel, one.architecture] = max(most[one.kernel, one.architecture], one.registers)
    return dict(most)


def compiler() -> str:
    """The version of nvcc that the module was built with: ``13.0.88``."""
    return native.library().cuda_info()["compiler"]


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(names), _row("---" for _ in names)]


def launch_rows(
    launches: Sequence[dict[str, Any]], most: dict[tuple[str, int], int]
) -> Iterator[str]:
    """The page's table of launches; each kernel once for an operator, as first launched."""
    yield from _head("call", "kernel", "blocks", "threads", "shared", "warps held")
    for one in launches:
        registers = most[one["kernel"], 90]
        held = occupancy(90, registers, one["shared"], one["threads"] // 32)
        yield _row(
            (
                one["call"],
                f"`{one['kernel']}`",
                f"{one['blocks']:,}",
                one["threads"],
                f"{one['shared']:,}",
                held,
            )
        )


def register_rows(found: Sequence[Resources]) -> Iterator[str]:
    """The page's table of registers, a row for each instance."""
    architectures = sorted({one.architecture for one in found})
    yield from _head("kernel", "instance", *(f"sm_{a}" for a in architectures))
    rows: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for one in found:
        rows[one.kernel, one.instance][one.architecture] = one.registers
    for (kernel, instance), registers in rows.items():
        cells = [registers.get(architecture, "") for architecture in architectures]
        yield _row((f"`{kernel}`", instance, *cells))


def page(found: Sequence[Resources], launches: Sequence[dict[str, Any]]) -> str:
    """The part on CUDA kernels of ``docs/kernels.md``."""
    architectures = ", ".join(f"sm_{a}" for a in sorted({one.architecture for one in found}))
    lines = [
        MARK,
        _PAGE.format(compiler=compiler(), architectures=architectures),
        *launch_rows(launches, most_registers(found)),
        "\n## Registers\n\nOf a thread, for each instance (types and sizes it is compiled for).\n",
        *register_rows(found),
    ]
    return "\n".join(lines) + "\n"


def with_part(text: str, part: str) -> str:
    """The page with its part on CUDA kernels replaced, or added."""
    before, _, _ = text.partition(MARK)
    return before.rstrip() + "\n\n" + part


def main(arguments: list[str] | None = None) -> int:
    """Report; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.cuda_kernels", description=__doc__
    )
    parser.add_argument("--launches", type=Path, help="what make emulate noted")
    parser.add_argument("--write", type=Path, help="the page, docs/kernels.md")
    options = parser.parse_args(arguments)
    if native.library().cuda_info() is None:
        raise SystemExit(f"_C has no CUDA kernels: {native.why_not('cuda')}")
    found = resources(Path(native.library().__file__))
    wrong = [one for one in found if one.stack]
    for one in found:
        sys.stdout.write(
            f"sm_{one.architecture} {one.kernel}<{one.instance}>: {one.registers} registers, "
            f"{one.stack} bytes of stack\n"
        )
    if options.write:
        if options.launches is None:
            parser.error("--write needs --launches")
        launches = json.loads(options.launches.read_text())
        text = with_part(options.write.read_text(), page(found, launches))
        write_whole(options.write, lambda path: path.write_text(text))
    for one in wrong:
        sys.stdout.write(f"WRONG: {one.kernel}<{one.instance}> spills on sm_{one.architecture}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

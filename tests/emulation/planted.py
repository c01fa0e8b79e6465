# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the real kernels are caught: run by ``make emulate`` after its tests passed.

Each fault changes one text in a copy of ``csrc``, compiles the kernel's file, links it with what
``make emulate`` built, and runs tests of the operator on it, which must fail and say why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Those of tests/native/sanitize.py; optimization is left to what takes least time.
FLAGS = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -DGRCSF_EMULATED -Wno-unknown-pragmas"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        what: as one calls it.
        kernel: the file of ``csrc/cuda`` that is compiled.
        file: the file of ``csrc/cuda`` that the text is in.
        text: what stands there once.
        instead: what is put there.
        tests: which tests run, after ``cuda-emulated``.
        said: a regular expression for what they say.
    """

    what: str
    kernel: str
    file: str
    text: str
    instead: str
    tests: str
    said: str


FAULTS = [
    Planted(
        "a missing barrier",
        "residual_map/residual_map.cu",
        "residual_map/residual_map.cu",
        "  sync_block();  // `space` is free again\n",
        "",
        "residual_map",
        r"a race: shared memory is written that .* read with no barrier between",
    ),
    Planted(
        "one value too many at the end of the last patch",
        "residual_map/residual_map.cu",
        "residual_map/residual_map.cu",
        "i < share.end; i += m.lanes * N) {\n    const std::int64_t place = place_of(m, i);",
        "i <= share.end; i += m.lanes * N) {\n    const std::int64_t place = place_of(m, i);",
        "residual_map",
        r"AddressSanitizer: heap-buffer-overflow|worst element|race",
    ),
    Planted(
        "a wrong stride",
        "residual_map/residual_map.cu",
        "residual_map/residual_map.cu",
        "const std::int64_t start = z * m.stride_d + y * m.stride_h;",
        "const std::int64_t start = z * m.stride_h + y * m.stride_h;",
        "residual_map",
        r"AddressSanitizer: heap-buffer-overflow|AssertionError: .*(is not finite| > )",
    ),
    Planted(
        "a deep voxel beyond the end of its axis",
        "gcu/forward.cu",
        "gcu/axis.cuh",
        "position.step = low < axis.deep - 1 && rest != 0 ? 1 : 0;",
        "position.step = low < axis.deep && rest != 0 ? 1 : 0;",
        "gcu",
        r"AddressSanitizer: heap-buffer-overflow|AssertionError: .*(is not finite| > )",
    ),
    Planted(
        "an edge patch as large as the others",
        "rcu/forward.cu",
        "rcu/problem.cuh",
        "box.width = least(m.patch_w, m.width - w);",
        "box.width = m.patch_w;",
        "rcu",
        r"AddressSanitizer: heap-buffer-overflow|AssertionError: .*(is not finite| > )|race",
    ),
    Planted(
        "a tile that is fetched while lanes still read the last one",
        "rcu/small_patch/backward.cu",
        "rcu/small_patch/backward.cu",
        "  sync_warp();  // lanes are done with the tile of x\n",
        "",
        "rcu and rows_of_whole_vectors",
        r"a race: shared memory is written that .* read with no barrier between",
    ),
]


def compiled(fault: Planted, build: Path, folder: Path) -> Path:
    """The module with the fault."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc/cuda" / fault.file
    before = source.read_text()
    if fault.text not in before:
        raise SystemExit(f"{fault.what}: {fault.file} no longer has the text to change")
    source.write_text(before.replace(fault.text, fault.instead))
    compiler, built = os.environ.get("CXX", "g++"), folder / "kernel.o"
    include = [f"-I{folder / 'csrc'}", f"-I{ROOT / 'tests/emulation'}"]
    kernel = ["-x", "c++", "-c", str(folder / "csrc/cuda" / fault.kernel), "-o", str(built)]
    subprocess.run([compiler, *FLAGS.split(), *SANITIZERS.split(), *include, *kernel], check=True)
    others = [o for o in build.rglob("*.o") if not o.match(f"csrc/cuda/{fault.kernel}.o")]
    plan = (build / "build.ninja").read_text()  # not what an earlier build left behind
    objects = [str(o) for o in others if str(o.relative_to(build)) in plan]
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["-shared", *SANITIZERS.split(), "-o", str(module), str(built), *objects, "-ldl"]
    subprocess.run([compiler, *link], check=True)
    return module


def check(
    build: Path, package: Path, folder: Path, environment: dict[str, str], pytest: list[str]
) -> None:
    """Plant every fault; the first that no test catches ends everything."""
    own = package / "grcsf_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    good = folder / "good.so"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(own, good)
    try:
        for fault in FAULTS:
            shutil.copy2(compiled(fault, build, folder / "planted"), own)
            chosen = ["-k", f"cuda-emulated and {fault.tests}", str(ROOT / "tests/ops")]
            result = subprocess.run(
                [*pytest, *chosen],
                cwd=package,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                check=False,
            )
            said = result.stdout + result.stderr
            found = re.search(fault.said, said)
            if result.returncode == 0 or found is None:
                raise SystemExit(f"{fault.what} was not caught:\n{said[-4000:]}")
            sys.stdout.write(f"planted {fault.what}: caught ({found[0]})\n")
    finally:
        shutil.copy2(good, own)

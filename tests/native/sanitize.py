# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels built with sanitizers, and tested: ``make sanitize``, ``make sanitize-quick``.

*address* (with undefined): ``_C`` is built into ``build/sanitize`` beside a copy of the package's
Python files, and the tests of the operators run on that copy, for AVX2 and for portable vectors of
64 bytes, which are those of AVX-512 on any processor. First a buffer is overrun on purpose: without
a report of it nothing below would mean anything.

*emulated*: the CUDA kernels, compiled as C++ and run on the CPU (``tests/emulation``), with their
operators' tests and with faults that must be caught: ``make emulate``.

*thread*: a program of its own (``races.cpp``), since OpenMP's runtime can't be seen into.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build/sanitize"
PACKAGE = BUILD / "package"
EMULATED = BUILD / "emulated-package"

CHECK = """
import ctypes, pathlib, sys
from grcsf_kernels import native
path = pathlib.Path(native.library().__file__)
assert path.is_relative_to(sys.argv[1]), f"{path} is not the sanitized build"
assert b"__asan_report_store" in path.read_bytes(), f"{path} was not built with sanitizers"
assert ctypes.CDLL(None).__asan_init, "the sanitizer is not in this process"
print(f"{path.relative_to(sys.argv[1])} runs on {native.library().isa()} under the sanitizer")
"""
OVERRUN = """
import torch
from grcsf_kernels import native
values = torch.zeros(64)
native.library().exponential(native.capsule(values), native.capsule(torch.zeros(48)))
"""

# Checks of every pointer take most of the time to compile; addresses are checked anyway.
CHEAP = "address;bounds;shift;signed-integer-overflow;integer-divide-by-zero;bool;return"

# What the quick form leaves out: properties of torch's machinery, what differs in values only, and
# the largest of sizes that take the same path.
SLOW = (
    "opcheck or gradcheck or same_bits or extreme or layout or errors or empty or global or limits "
    "or space1 or patch1 or few_channels or many_patches or threads"
)


# What a sanitizer prints as it ends the process goes past --capture=sys.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-x"]
PYTEST += ["--capture=sys"]


def run(command: list[str], folder: Path = ROOT, **environment: str) -> None:
    """Run a step; the first that fails ends everything."""
    result = subprocess.run(command, cwd=folder, env=os.environ | environment, check=False)
    if result.returncode:
        raise SystemExit(f"failed ({result.returncode}): {' '.join(command)}")


def build(name: str, sanitizers: str, target: str, *options: str) -> Path:
    """Build one target; the folder it lies in."""
    folder = BUILD / name
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        raise SystemExit("cmake was not found")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(
        [
            *(cmake, "-S", str(ROOT), "-B", str(folder), *generator),
            *("-DCMAKE_BUILD_TYPE=Debug", f"-DGRCSF_SANITIZE={sanitizers}"),
            *options,
            *("-DGRCSF_BUILD_CUDA=0", "-DGRCSF_PORTABLE_VECTOR_BYTES=64"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
    )
    run([cmake, "--build", str(folder), "--target", target, "--parallel"])
    return folder


def copy_package(folder: Path, package: Path) -> None:
    """The package's Python files, beside the sanitized ``_C``."""
    target = package / "grcsf_kernels"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        ROOT / "grcsf_kernels", target, ignore=shutil.ignore_patterns("_C.*", "__pycache__")
    )
    shutil.copy2(folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", target)


def library(name: str) -> str:
    """The path of a library of the compiler."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        raise SystemExit(f"{compiler} has no {name}")
    return os.path.realpath(found)


def environment_of(package: Path) -> dict[str, str]:
    """The environment in which Python loads a sanitized ``_C``."""
    return {
        # libstdc++ too: Python does not link it, and exceptions are looked up at the start.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=32",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package),
        # Only native code is looked at: Triton is not even loaded.
        "TRITON_INTERPRET": "0",
        "CI": "1",
    }


def check_addresses(quick: bool) -> None:
    """The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if quick:
        copy_package(build("quick", CHEAP, "_C", "-DGRCSF_BUILD_X86=OFF"), PACKAGE)
    else:
        copy_package(build("address", "address;undefined", "_C"), PACKAGE)
    environment = environment_of(PACKAGE)
    result = subprocess.run(
        [sys.executable, "-c", OVERRUN],
        env=os.environ | environment,
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0 or "heap-buffer-overflow" not in result.stderr:
        raise SystemExit(f"the sanitizer did not report an overrun buffer:\n{result.stderr}")

    # Only the native backend: the parameters of the operators' tests are named backend-device.
    chosen = f"cpu-cpu and not ({SLOW})" if quick else "cpu-cpu or bits_do_not_depend"
    tests = [str(ROOT / "tests/ops"), str(ROOT / "tests/native/test_threads.py")]
    for isa in ("portable",) if quick else ("portable", "avx2"):
        check = [sys.executable, "-c", CHECK, str(PACKAGE)]
        run(check, PACKAGE, GRCSF_CPU_ISA=isa, **environment)
        run([*PYTEST, "-k", chosen, *tests], PACKAGE, GRCSF_CPU_ISA=isa, **environment)


def check_emulated(arguments: list[str]) -> None:
    """The CUDA kernels as C++, under both sanitizers; ``arguments`` go to pytest."""
    folder = build("emulated", "address;undefined", "_C", "-DGRCSF_EMULATE_CUDA=ON")
    copy_package(folder, EMULATED)
    environment = environment_of(EMULATED)
    run([sys.executable, "-c", CHECK, str(EMULATED)], EMULATED, **environment)
    tests = [str(ROOT / "tests/ops"), str(ROOT / "tests/emulation")]
    chosen = ["-k", "cuda-emulated or emulation", *tests]
    # Paths as one types them, from the checkout.
    named = [str(ROOT / a) if (ROOT / a.partition("::")[0]).exists() else a for a in arguments]
    run([*PYTEST, *(named or chosen)], EMULATED, **environment)
    if not arguments:
        sys.path.insert(0, str(ROOT / "tests/emulation"))
        import planted

        planted.check(folder, EMULATED, BUILD, environment, PYTEST)


def check_races() -> None:
    """Every kernel under ThreadSanitizer."""
    program = str(build("thread", "thread", "races") / "races")
    raced = subprocess.run([program, "race"], capture_output=True, text=True, check=False)
    if raced.returncode == 0 or "data race" not in raced.stderr:
        raise SystemExit(f"the sanitizer did not report a race:\n{raced.stderr}")
    run([program])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="minutes: a part, portable only")
    parser.add_argument("--sanitizer", choices=("address", "thread", "emulated"), default="address")
    parser.add_argument("tests", nargs="*", help="of emulated: arguments of pytest instead of all")
    options = parser.parse_args()
    if options.sanitizer == "emulated":
        check_emulated(options.tests)
    elif options.sanitizer == "thread":
        check_races()
    else:
        check_addresses(options.quick)

# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check``: everything that only a GPU can tell, in one command of at most nine minutes.

Builds ``_C`` with CUDA in place, runs the tests, compute-sanitizer and the quick benchmarks, and
profiles one launch of each kernel. Needs no network: what is missing is said, and the rest goes on.
Without a GPU it builds for CPU and does what is left. ``--dry-run`` prints the plan.

Everything goes to ``--out``: ``summary.md``, a log for each step, the results and their report.
The exit status is 1 where a step failed; a step that could not run fails nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.run import PYTEST

_ROOT = Path(__file__).resolve().parents[2]
_BUDGET = 520.0  # seconds for all steps: below nine minutes with what lies between them
_PYTHON = sys.executable
# In a command: the seconds that are left.
_LEFT = "{left}"
# The kernels of this library carry its name; PyTorch's own are not ours to check.
_OURS = "grcsf"


@dataclass
class Step:
    """One command.

    Attributes:
        name: of the step and of its log.
        command: what is run.
        seconds: its longest time.
        missing: why it can't run, or an empty string.
        environment: variables to add.
    """

    name: str
    command: list[str]
    seconds: float
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def _absent_modules(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _tests() -> Step:
    """The whole suite; the parts whose packages are missing are left out by name.

    The Triton kernels are compiled ahead of time in a step of their own, for this device alone.
    """
    command = [*PYTEST, "tests", "-q", "-p", "no:cacheprovider"]
    command.append("--ignore=tests/triton_kernels/test_kernels.py")
    if not _absent_modules("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    left_out = []
    if absent := _absent_modules("monai", "nibabel", "lightning_fabric", "yaml", "matplotlib"):
        parts = ("tests/engine", "tests/test_cli.py", "tests/test_cli_errors.py")
        command += [f"--ignore={part}" for part in parts]
        left_out.append(f"{', '.join(parts)} (no {', '.join(absent)})")
    missing = "pytest is not installed" if _absent_modules("pytest", "hypothesis") else ""
    name = "tests" + (f" without {'; '.join(left_out)}" if left_out else "")
    return Step(name, command, 200, missing)


def _sanitizers(gpu: str) -> Iterator[Step]:
    tool = shutil.which("compute-sanitizer")
    missing = gpu or ("" if tool else "compute-sanitizer is not on the path")
    pick = []
    if not missing:
        shown = subprocess.run([str(tool), "--help"], capture_output=True, text=True, check=False)
        # The option was renamed between versions.
        option = "--kernel-name" if "--kernel-name" in shown.stdout else "--filter"
        pick = [option, f"kns={_OURS}"]
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", *pick]
        command += [_PYTHON, "-m", "benchmarks.gpu.launches"]
        # Without the caching allocator every tensor has bounds of its own.
        yield Step(check, command, 45, missing, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _kernels(gpu: str) -> Step:
    """Registers, spills and occupancy of the Triton kernels on this device's architecture."""
    command = [_PYTHON, "-m", "benchmarks.gpu.kernels", "--quick"]
    missing = gpu or ("triton is not installed" if _absent_modules("triton") else "")
    if not missing:
        major, minor = torch.cuda.get_device_capability()
        command += ["--architectures", str(10 * major + minor)]
    return Step("kernels", command, 45, missing)


def _cuda_kernels() -> Step:
    """Registers and spills of the CUDA kernels, as they were built."""
    missing = "" if shutil.which("c++filt") else "c++filt is not on the path"
    return Step("cuda_kernels", [_PYTHON, "-m", "benchmarks.gpu.cuda_kernels"], 30, missing)


def plan(out: Path, gpu: str) -> list[Step]:
    """The steps in order; ``gpu`` says why there is none, or is empty."""
    pip = [_PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", "."]
    no_build = _absent_modules("setuptools", "pybind11")
    no_build += [] if shutil.which("cmake") else ["cmake"]
    device = "cpu" if gpu else "cuda"
    bench = [_PYTHON, "-m", "benchmarks.run", "--quick", f"--device={device}", f"--out={out}"]
    bench += ["--budget", _LEFT]
    ncu = [shutil.which("ncu") or "ncu", "--clock-control", "none", "--set", "full"]
    ncu += ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{_OURS}"]
    ncu += ["--launch-count", "40", "--page", "details"]
    ncu += [_PYTHON, "-m", "benchmarks.gpu.launches", "--large"]
    no_benchmark = (
        "pytest-benchmark is not installed" if _absent_modules("pytest_benchmark") else ""
    )
    no_ncu = gpu or ("" if shutil.which("ncu") else "ncu is not on the path")
    steps = [
        Step("build", pip, 150, f"missing: {', '.join(no_build)}" if no_build else ""),
        Step("doctor", [_PYTHON, "-m", "grcsf_kernels.doctor"], 30),
        _tests(),
        *_sanitizers(gpu),
        Step("ncu", ncu, 60, no_ncu),
        _kernels(gpu),
        _cuda_kernels(),
        # Last, because it takes what time is left.
        Step("benchmarks", bench, _BUDGET, no_benchmark and f"missing: {no_benchmark}"),
    ]
    if not gpu:
        # Real kernels, whatever the shell has set: with a GPU nothing runs in Triton's interpreter.
        for step in steps:
            step.environment["TRITON_INTERPRET"] = "0"
    return steps


def run_step(step: Step, out: Path, deadline: float) -> tuple[str, float]:
    """``ok``, or what went wrong, and the seconds it took; the output goes to the step's log."""
    if step.missing:
        return f"not run: {step.missing}", 0.0
    left = deadline - time.monotonic()
    if left < 5:
        return "not run: no time left", 0.0
    command = [part.replace(_LEFT, str(int(left - 10))) for part in step.command]
    start = time.monotonic()
    with open(out / f"{step.name.split()[0]}.log", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=os.environ | step.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=min(step.seconds, left))
            said = "ok" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired as expired:
            # With its children: what went on running would disturb the next step.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said = f"stopped after {expired.timeout:.0f} s"
    return said, time.monotonic() - start


def _tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def summary(done: list[tuple[Step, str, float]], out: Path, gpu: str) -> str:
    """``summary.md``: the machine, a line for each step, and the ends of the logs that matter."""
    device = results.device_name("cpu" if gpu else "cuda")
    text = [f"# GPU check on {device}", f"No GPU: {gpu}" if gpu else ""]
    text.append("\n".join(f"- {step.name}: {said} ({took:.0f} s)" for step, said, took in done))
    for step, said, _ in done:
        log = out / f"{step.name.split()[0]}.log"
        if log.exists() and (said != "ok" or step.name.split()[0] in ("doctor", "tests")):
            text += [f"## {step.name}", f"```\n{_tail(log, 40)}\n```"]
    return "\n\n".join(part for part in text if part) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the plan; the exit status is 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--budget", type=float, default=_BUDGET, help="seconds for all steps")
    options = parser.parse_args(arguments)
    gpu = "" if torch.cuda.is_available() else "torch finds no CUDA device"
    out = (options.out or results.default_folder("cpu" if gpu else "cuda")).resolve()
    steps = plan(out, gpu)
    if options.dry_run:
        for step in steps:
            why = f"  not run: {step.missing}\n" if step.missing else ""
            sys.stdout.write(f"{step.name}\n{why}  {' '.join(step.command)}\n")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget
    done = []
    for step in steps:
        said, took = run_step(step, out, deadline)
        done.append((step, said, took))
        sys.stdout.write(f"{step.name}: {said} ({took:.0f} s)\n")
        sys.stdout.flush()
        # Written after every step: what is known is not lost where a later one takes too long.
        (out / "summary.md").write_text(summary(done, out, gpu))
    sys.stdout.write(f"{out / 'summary.md'}\n")
    return 1 if any(said.startswith("FAILED") for _, said, _ in done) else 0


if __name__ == "__main__":
    raise SystemExit(main())

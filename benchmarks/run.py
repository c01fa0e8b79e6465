# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.run``: every suite in a process of its own, then the report.

``make bench`` calls it. A suite that fails is named at the end; the others run all the same. What a
suite measured is written whole when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import results

SUITES = ("residual_map", "gcu", "rcu", "nn", "model", "scaling")
# "python -m pytest" would put the checkout before an installed package.
_CODE = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
PYTEST = (sys.executable, "-c", _CODE)
_ROOT = Path(__file__).resolve().parent.parent


def run_suite(suite: str, out: Path, arguments: list[str], timeout: float | None) -> str:
    """Run one suite; why it failed, or an empty string."""
    path = out / f"{suite}.json"
    temporary = out / f".{os.getpid()}.{suite}.json"
    command = [
        *(*PYTEST, f"benchmarks/suites/bench_{suite}.py", "-q", "--no-header"),
        *("--benchmark-columns=min,median,iqr,rounds", f"--benchmark-json={temporary}"),
        *arguments,
    ]
    process = subprocess.Popen(command, cwd=_ROOT)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        # As Ctrl-C: pytest-benchmark then writes what it has measured.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        return f"was stopped after {timeout:.0f} s"
    finally:
        # pytest-benchmark also writes what was measured before a failure.
        if temporary.exists() and temporary.stat().st_size:
            if "-k" in arguments and path.exists():  # a part of the suite: the rest is kept
                whole = results.merge(
                    json.loads(path.read_text()), json.loads(temporary.read_text())
                )
                temporary.write_text(json.dumps(whole, indent=1))
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    return "" if code == 0 else f"ended with status {code}"


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, help="seconds for all suites together")
    parser.add_argument("-k", dest="pick", help="passed to pytest; other rows stay")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = (options.out or results.default_folder(device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    passed = [f"--device={device}"]
    passed += ["--quick"] if options.quick else []
    passed += ["-k", options.pick] if options.pick else []

    # Where this was started in the background, Ctrl-C is ignored, also by the suites.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = {}
    end = time.monotonic() + (options.budget or float("inf"))
    for suite in options.suites:
        start = time.monotonic()
        left = None if options.budget is None else max(0.0, end - start)
        problem = run_suite(suite, out, passed, left) if left != 0 else "no time was left"
        if problem:
            failed[suite] = problem
        sys.stdout.write(f"{suite}: {problem or 'done'}, {time.monotonic() - start:.0f} s\n")
        sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "benchmarks.report", str(out)], cwd=_ROOT, check=False)
    for suite, problem in failed.items():
        sys.stderr.write(f"benchmarks/suites/bench_{suite}.py: {problem}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

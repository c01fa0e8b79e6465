# SPDX-License-Identifier: Apache-2.0
"""Random cases, from seeds, until the time is up: ``make fuzz``.

    python tests/fuzz --seconds 300 --seed 0
    python tests/fuzz --only operators --case 17    # one case again

An area is a module of this folder with ``check(case: int) -> str``: it makes the case of this
number, raises where something is wrong, and otherwise returns the kind of case, which is counted.
Each area runs in a process of its own, so that one that crashes or hangs is reported like any other
failure, and the rest of the cases still run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
AREAS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem in ("operators", "readers"))

# The cases of one seed begin at this multiple of it.
CASES_OF_A_SEED = 1_000_000
# Seconds that one case may take. A machine may have other work to do.
LONGEST = 120
# An area with more failures than this is broken: the rest says nothing new.
MOST_FAILURES = 20


def run_here(area: str, first: int, seconds: float) -> None:
    """Run cases in this process and say each before it runs: what a crash leaves behind."""
    check = importlib.import_module(f"fuzz.{area}").check
    end = time.monotonic() + seconds
    case = first
    while time.monotonic() < end:
        print(f"case {case}", flush=True)
        try:
            print(f"kind {check(case)}", flush=True)
        except Exception:
            said = traceback.format_exc().strip().replace("\n", "\x1f")
            print(f"failed {said}", flush=True)
        case += 1


class Area:
    """The cases of one area, in processes that are started again where one dies."""

    def __init__(self, name: str, seed: int, seconds: float) -> None:
        self.name, self.end = name, time.monotonic() + seconds
        self.first = self.case = seed * CASES_OF_A_SEED
        self.done = 0
        self.kinds: Counter[str] = Counter()
        self.failures: list[tuple[int, str]] = []

    def run(self) -> None:
        """Until the time is up."""
        following = self.first
        while time.monotonic() < self.end and len(self.failures) <= MOST_FAILURES:
            self._process(following)
            following = self.case + 1

    def _process(self, first: int) -> None:
        left = str(self.end - time.monotonic())
        command = [sys.executable, str(FOLDER), "--only", self.name, "--worker", str(first), left]
        self.case = first
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stdout is not None and process.stderr is not None
        lines: queue.Queue[str | None] = queue.Queue()
        complaints: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        readers = [
            threading.Thread(target=read, daemon=True),
            threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            while (line := lines.get(timeout=LONGEST)) is not None:
                self._heard(line.rstrip("\n"))
                if len(self.failures) > MOST_FAILURES:
                    process.kill()
                    process.wait()
                    return
        except queue.Empty:
            process.kill()
            process.wait()
            self._failed(f"took longer than {LONGEST} s")
            return
        if process.wait():
            readers[1].join(timeout=5)
            said = "".join(complaints[-20:]).strip()
            self._failed(f"ended the process with status {process.returncode}\n{said}")

    def _heard(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "case":
            self.case = int(rest)
            self.done += 1
        elif word == "kind":
            self.kinds[rest] += 1
        elif word == "failed":
            self._failed(rest.replace("\x1f", "\n"))

    def _failed(self, why: str) -> None:
        self.failures.append((self.case, why))
        print(f"{self.name}: case {self.case} failed\n{why}\n{self._again(self.case)}", flush=True)

    def _again(self, case: int) -> str:
        return f"again: python tests/fuzz --only {self.name} --case {case}\n"

    def report(self) -> str:
        """Counts, and each failure's reproduction."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        text = f"{self.name}: cases {self.first} to {self.case}, {self.done} run"
        text += f", {len(self.failures)} failed ({kinds})\n"
        return text + "".join(self._again(case) for case, _ in self.failures)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="time limit (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="which cases (default: 0)")
    parser.add_argument("--only", choices=AREAS, help="one area instead of all")
    parser.add_argument("--case", type=int, help="run this case of an area, and nothing else")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Modules of tests/, and the package of the checkout where none is installed.
    sys.path[0] = str(FOLDER.parent)
    sys.path.append(str(FOLDER.parent.parent))
    if options.worker:
        run_here(options.only, int(options.worker[0]), float(options.worker[1]))
        return 0
    areas = [options.only] if options.only else AREAS
    if options.case is not None:
        if not options.only:
            parser.error("--case needs --only: which area the case is of")
        print(importlib.import_module(f"fuzz.{options.only}").check(options.case))
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    running = [Area(area, options.seed, options.seconds) for area in areas]
    threads = [threading.Thread(target=area.run) for area in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for area in running:
        print(area.report(), end="")
    return 1 if any(area.failures or not area.done for area in running) else 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Pieces of a study in processes of their own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.study.runs import Study
from benchmarks.study.scales import SCALES
from grcsf_kernels.engine.report import console

Job = tuple[Callable[..., None], tuple[Any, ...]]


def run_all(jobs: list[Job], processes: int) -> list[str]:
    """Call every job in a fresh process, some at once; what went wrong, a line each."""
    failed = []
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {
            pool.submit(_call, function, *arguments): (function, arguments)
            for function, arguments in jobs
        }
        for future in as_completed(waiting):
            problem = future.exception()
            if problem is not None:
                function, arguments = waiting[future]
                what = " ".join([function.__name__, *map(str, arguments[1:])])
                failed.append(f"{what}: {problem}")
                sys.stderr.write(failed[-1] + "\n")
    return failed


def _call(function: Callable[..., None], *arguments: Any) -> None:
    """In the fresh process: without the engine's bars, and with a line at the end."""
    console.quiet = True
    start = time.perf_counter()
    function(*arguments)
    what = " ".join([function.__name__, *map(str, arguments[1:])])
    sys.stdout.write(f"{what}: {time.perf_counter() - start:.0f} s\n")
    sys.stdout.flush()


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with what every command of the study takes; see :func:`opened`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/study-<scale>")
    parser.add_argument("--work", type=Path, help="default: build/study/<scale>")
    parser.add_argument("--jobs", type=int, help="processes at once; default: cores, 1 on a GPU")
    return parser


def opened(options: argparse.Namespace) -> tuple[Study, int]:
    """The study that the options of :func:`make_parser` name, and how many processes at once."""
    study = Study(
        SCALES[options.scale],
        (options.work or Path("build/study") / options.scale).resolve(),
        (options.out or results.FOLDER / f"study-{options.scale}").resolve(),
    )
    return study, use_one_thread_each(options.jobs)


def exit_status(failed: list[str]) -> int:
    """Say again what failed; 1 where anything did."""
    for problem in failed:
        sys.stderr.write(f"failed: {problem}\n")
    return 1 if failed else 0


def use_one_thread_each(jobs: int | None) -> int:
    """How many processes at once; on CPU each gets its share of the threads.

    Small networks: several at once, on a thread each, are faster than one on all cores.

    Args:
        jobs: as many; None: one a thread, or one on a GPU.
    """
    if torch.cuda.is_available():
        return jobs or 1
    threads = torch.get_num_threads()
    jobs = jobs or threads
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return jobs

# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.study``: the whole study from nothing, or what is missing of it.

Every piece (the subjects, the maps of a seed, an arm with a seed) runs in a process of its own and
leaves a result; the same call goes on where an earlier one ended. The report is written again
after every piece.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.study import costs, report, runs
from benchmarks.study.pool import Job, run_all, use_one_thread_each
from benchmarks.study.protocol import ARMS, SEEDS
from benchmarks.study.runs import Study
from benchmarks.study.scales import SCALES


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing; the exit status is 1 where a piece failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/study-<scale>")
    parser.add_argument("--work", type=Path, help="default: build/study/<scale>")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, help="processes at once; default: cores, 1 on a GPU")
    options = parser.parse_args(arguments)
    jobs = use_one_thread_each(options.jobs)
    study = Study(
        SCALES[options.scale],
        (options.work or Path("build/study") / options.scale).resolve(),
        (options.out or results.FOLDER / f"study-{options.scale}").resolve(),
    )

    failed = run_all([(runs.make_subjects, (study, name)) for name in runs.SETS], jobs)
    arms = [(seed, arm) for seed in options.seeds for arm in options.arms]
    needing = [pair for pair in arms if ARMS[pair[1]].masking is not None]
    stages: list[list[Job]] = [
        [
            *((runs.make_maps, (study, seed)) for seed in options.seeds if needing),
            *(
                (runs.run_arm, (study, arm, seed))
                for seed, arm in arms
                if (seed, arm) not in needing
            ),
            (runs.rate_difficulty, (study,)),
        ],
        [(runs.run_arm, (study, arm, seed)) for seed, arm in needing],
    ]
    for stage in stages:
        # Maps that are missing fail the arms that need them, and no other.
        failed += run_all(stage, jobs)
    failed += run_all([(costs.measure_costs, (study, arm)) for arm in options.arms], 1)
    report.write(study)
    for problem in failed:
        sys.stderr.write(f"failed: {problem}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

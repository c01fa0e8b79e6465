# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.study``: the whole study from nothing, or what is missing of it.

Every piece (the subjects, the maps of a seed, an arm with a seed) runs in a process of its own and
leaves a result; the same call goes on where an earlier one ended. The report comes last.
"""

from __future__ import annotations

from benchmarks.study import costs, report, runs
from benchmarks.study.pool import Job, exit_status, make_parser, opened, run_all
from benchmarks.study.protocol import ARMS, SEEDS


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing; the exit status is 1 where a piece failed."""
    parser = make_parser("python -m benchmarks.study", __doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args(arguments)
    study, jobs = opened(options)

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
    return exit_status(failed)


if __name__ == "__main__":
    raise SystemExit(main())

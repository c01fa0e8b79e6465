# SPDX-License-Identifier: Apache-2.0
"""Split cases across processes: torchrun, or RANK and WORLD_SIZE in the environment."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from grcsf_kernels.common.errors import InputError

Item = TypeVar("Item")

_LONGEST = timedelta(days=30)
_calls = itertools.count()


# How many tasks a launcher other than torchrun started this one with.
_LAUNCHERS = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "mpiexec": "PMI_SIZE",
}


def _launched_by() -> tuple[str, str, str] | None:
    """Launcher, variable and number of tasks, where there are several that do not know it."""
    found = [(by, name, os.environ.get(name, "1")) for by, name in _LAUNCHERS.items()]
    # A job's script is task 0 of its allocation, whatever srun will start from it.
    if os.environ.get("SLURM_PROCID", "0") != "0":
        found.append(("srun", "SLURM_NTASKS", os.environ.get("SLURM_NTASKS", "1")))
    return next((one for one in found if one[2] != "1"), None)


def expect_torchrun() -> None:
    """Of a training that torchrun has not started: it must be the only one.

    Raises:
        InputError: variables of several processes, each of which would train the same.
    """
    remedy = (
        "start the processes with torchrun --standalone --nproc-per-node N -m grcsf_kernels.cli "
        "..., or take the variables away"
    )
    texts = {n: os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n in os.environ}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, text in texts.items():
        if text != alone[name]:
            raise InputError(name, f"is {text}, and torchrun has not set it", remedy)
    launched = _launched_by()
    if launched is not None:
        by, name, tasks = launched
        problem = f"is {tasks}: every task of {by} would train the same"
        raise InputError(name, problem, "start one task on each node, with torchrun in it")


def rank_and_world() -> tuple[int, int]:
    """``RANK`` and ``WORLD_SIZE``; 0 and 1 where they are not set.

    Raises:
        InputError: variables that are no rank of a world, or a launcher that sets others.
    """
    launched = None if "RANK" in os.environ else _launched_by()
    if launched is not None:
        by, name, tasks = launched
        number = "SLURM_PROCID" if by == "srun" else "the number of the task"
        raise InputError(
            name,
            f"is {tasks}: every task of {by} would do all cases",
            f"set RANK to {number} and WORLD_SIZE to {name}, so that each does its share",
        )
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = (int(text) for text in texts)
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise InputError(
            "RANK, WORLD_SIZE", f"are {texts[0]}, {texts[1]}", "expected 0 <= RANK < WORLD_SIZE"
        )
    return rank, world


def shard(items: Sequence[Item]) -> Sequence[Item]:
    """The share of this process: every n-th item."""
    rank, world = rank_and_world()
    return items[rank::world]


def wait_for_others() -> None:
    """Under torchrun, return when all processes have called this.

    Cases that were skipped make the exit status 1, and at the first one torchrun ends all other
    processes: none may exit while another still works. Elsewhere nothing waits.
    """
    rank, world = rank_and_world()
    if world == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    call = next(_calls)
    store.set(f"grcsf/{call}/{rank}", "done")
    store.wait([f"grcsf/{call}/{other}" for other in range(world)], _LONGEST)

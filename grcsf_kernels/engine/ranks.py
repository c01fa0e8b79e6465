# SPDX-License-Identifier: Apache-2.0
"""Processes that share cases: torchrun's, or any that have RANK and WORLD_SIZE."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from grcsf_kernels.engine.errors import InputError

Item = TypeVar("Item")

_LONGEST = timedelta(days=30)
_calls = itertools.count()


def rank_and_world() -> tuple[int, int]:
    """``RANK`` and ``WORLD_SIZE``; 0 and 1 where they are not set.

    Raises:
        InputError: variables that are no rank of a world.
    """
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

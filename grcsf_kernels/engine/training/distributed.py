# SPDX-License-Identifier: Apache-2.0
"""One process or many: what Fabric is started with, and what the processes say to each other.

Many processes are started by ``torchrun``, which also ends all of them when one dies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from grcsf_kernels.common.atomic_files import saving
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.locks import only_run_in
from grcsf_kernels.engine.config import OptimizationConfig
from grcsf_kernels.engine.devices import make_fabric
from grcsf_kernels.engine.inference.sharding import expect_torchrun
from grcsf_kernels.engine.report import console

Result = TypeVar("Result")


def launch(config: OptimizationConfig) -> Fabric:
    """Fabric for training: one process, or those of ``torchrun``.

    Raises:
        InputError: the device, the precision or the strategy is unknown, or they do not fit; or
            processes that something else than torchrun started.
    """
    strategy = config.strategy
    if strategy not in ("auto", "ddp", "fsdp"):
        raise InputError("strategy", f"is {strategy!r}", "expected auto, ddp or fsdp")
    started = dist.is_available() and dist.is_torchelastic_launched()
    if not started:
        expect_torchrun()
    world = int(os.environ["WORLD_SIZE"]) if started else 1
    if world == 1:
        return make_fabric(config.device, config.precision)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    options: dict[str, Any] = {"devices": local, "num_nodes": world // local}
    timeout = timedelta(minutes=config.timeout_minutes)
    if strategy == "fsdp":
        if config.precision == "16-mixed":
            raise InputError("precision", "is 16-mixed with strategy: fsdp", "use bf16-mixed")
        options["strategy"] = ModelParallelStrategy(
            _shard, data_parallel_size=world, tensor_parallel_size=1, timeout=timeout
        )
        if config.precision == "bf16-mixed":
            # As with the other strategies: float32 weights under autocast.
            kind = "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"
            options |= {"plugins": [MixedPrecision("bf16-mixed", kind)]}
    else:
        options["strategy"] = DDPStrategy(timeout=timeout)
    fabric = make_fabric(config.device, config.precision, **options)
    fabric.launch()
    console.quiet = not fabric.is_global_zero
    return fabric


def is_sharded(fabric: Fabric) -> bool:
    """Whether every process holds a part of the weights only."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: the weights of a block are whole only while it runs."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if getattr(module, "shardable", False):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def on_first(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """What ``work`` gives on the first process, on all of them; the others wait for it.

    Raises:
        InputError: ``work`` raised it; every process raises the same one, so that none waits.
    """
    if fabric.world_size == 1:
        return work()
    outcome: Any = None
    problem: BaseException | None = None
    if fabric.is_global_zero:
        try:
            outcome = ("done", work())
        except InputError as error:
            outcome = ("failed", (str(error.where), error.problem, error.remedy))
        except Exception as error:
            problem = error
            outcome = ("failed", ("the first process", str(error), "see its message"))
    kind, value = fabric.broadcast(outcome)
    if problem is not None:
        raise problem
    if kind == "failed":
        raise InputError(*value)
    return value


@contextmanager
def only_run(fabric: Fabric, output: Path) -> Iterator[None]:
    """Inside, no other run can write to ``output``, which is made.

    Raises:
        InputError: another run does, or the folder can't be written; every process raises it.
    """
    with ExitStack() as stack:

        def enter() -> None:
            with saving(output):
                stack.enter_context(only_run_in(output))

        on_first(fabric, enter)
        yield


def gather(fabric: Fabric, value: Result) -> list[Result]:
    """The values of all processes, in the order of their ranks."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return values


def expect_same(fabric: Fabric, value: object, where: str, remedy: str) -> None:
    """Every process has this value, or all raise.

    Raises:
        InputError: a process has another one.
    """
    for rank, other in enumerate(gather(fabric, value)):
        if other != value:
            problem = f"differs between process {fabric.global_rank} and process {rank}"
            raise InputError(where, problem, remedy)


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, or did not answer in time."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "closed by peer", "timed out"))

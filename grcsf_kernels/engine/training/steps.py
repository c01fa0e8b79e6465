# SPDX-License-Identifier: Apache-2.0
"""Crops made ahead of the step that needs them, each a function of its place in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.engine.config import OptimizationConfig

# crops(epoch, index) -> [1, C, *crop], the name of its case
CropMaker = Callable[[int, int], tuple[Tensor, str]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Around the reading of a case: a mean over its voxels has the same bits in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class MicroBatch:
    """Crops that go through the network together.

    Attributes:
        crops: [B, C, *crop].
        names: of their cases.
        epoch: from 0.
        step: within the epoch, from 0.
        first: place of the first crop among all crops of the step, over all processes.
        total: crops of the step.
    """

    crops: Tensor
    names: str
    epoch: int
    step: int
    first: int
    total: int

    @property
    def share(self) -> float:
        """Of these crops in all of the step."""
        return len(self.crops) / self.total

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the crops as bytes, sent through a pipe.

        torch would share their memory through /dev/shm and a socket in the folder for temporary
        files. Where either can't be made, the worker drops the crops and the training waits for
        them for ever.
        """
        return {**self.__dict__, "crops": self.crops.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.crops = torch.from_numpy(state["crops"])

    def pin_memory(self) -> MicroBatch:
        """For the loader: the crops in memory that a GPU reads without waiting."""
        self.crops = self.crops.pin_memory()
        return self


class _Steps(Dataset):
    """Item ``n``: the micro-batches of one process at step ``n`` of the training."""

    def __init__(self, crops: CropMaker, config: OptimizationConfig, rank: int, world: int) -> None:
        self._crops, self._config, self._rank, self._world = crops, config, rank, world

    def __getitem__(self, number: int) -> list[MicroBatch] | tuple[str, str, str]:
        config, size = self._config, self._config.batch_size
        epoch, step = divmod(number, config.steps_per_epoch)
        total = size * config.accumulate_batches * self._world
        made = []
        for micro in range(config.accumulate_batches):
            first = (micro * self._world + self._rank) * size
            try:
                pairs = [self._crops(epoch, step * total + first + i) for i in range(size)]
            except InputError as error:
                # As a value: an exception comes out of a worker process as another one.
                return str(error.where), error.problem, error.remedy
            crops = torch.cat([crop for crop, _ in pairs])
            names = ", ".join(name for _, name in pairs)
            made.append(MicroBatch(crops, names, epoch, step, first, total))
        return made


def load_steps(
    crops: CropMaker, config: OptimizationConfig, fabric: Fabric, first: int
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of this process on the CPU, from step ``first`` of the training to its end.

    ``config.workers`` processes make them ahead. What they make depends on the step alone, so any
    number of workers gives the same bits.

    Raises:
        InputError: a case that is not kept in memory can't be read any more, or a worker died.
    """
    loader: DataLoader = DataLoader(
        _Steps(crops, config, fabric.global_rank, fabric.world_size),
        batch_size=None,
        sampler=range(first, config.epochs * config.steps_per_epoch),
        num_workers=config.workers,
        # A fork shares the cases that are kept in memory.
        multiprocessing_context="fork" if config.workers else None,
        pin_memory=fabric.device.type == "cuda",
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not config.workers:
                raise
            raise InputError(
                "workers",
                f"one of {config.workers} ended ({one_line(error)})",
                "give them more memory, or set fewer; the same call goes on",
            ) from error
        if isinstance(item, tuple | list) and isinstance(item[0], str):
            raise InputError(*item)
        yield item

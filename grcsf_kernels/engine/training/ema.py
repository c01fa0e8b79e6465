# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """After each step, ``average = decay * average + (1 - decay) * weight``.

    Of sharded weights every process averages its own part.

    Args:
        weights: parameters; the average begins at their values.
        decay: from 0 (no average: the weights themselves) to below 1.
    """

    def __init__(self, weights: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = list(weights) if decay else []
        self._update = get_ema_multi_avg_fn(decay)
        self.restart()

    def restart(self) -> None:
        """Begin again, at the present weights."""
        self._average = [part.clone() for part in self._parts()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step that was just made."""
        if self.decay:
            self._update(self._average, self._parts(), 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._parts(), self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _parts(self) -> list[Tensor]:
        return [
            (weight.to_local() if isinstance(weight, DTensor) else weight).detach()
            for weight in self._weights
        ]

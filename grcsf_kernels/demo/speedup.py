# SPDX-License-Identifier: Apache-2.0
"""Time one training step with the fused kernels and with the reference."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from grcsf_kernels.dispatch import use_backend

_ROUNDS = 5


def measure_savings(model: nn.Module, shape: tuple[int, ...], maps: int) -> dict[str, Any]:
    """Time of a training step (forward, backward) on random crops.

    Args:
        model: called as ``model(image, residual)``, on the device where it is measured.
        shape: [B, C, *S] of the image.
        maps: residual maps K of a crop.

    Returns:
        ``seconds`` with the backends that are chosen by themselves, ``reference_seconds`` and
        ``times``, how many times as fast the former is; medians of five steps.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batch, _, *space = shape
    image = torch.randn(shape, generator=generator).to(device)
    residual = torch.rand((batch, maps, *space), generator=generator).to(device)

    def step() -> None:
        model(image, residual).float().square().mean().backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(backend: str) -> float:
        taken = []
        with use_backend(backend) if backend else nullcontext():
            for _ in range(1 + _ROUNDS):
                start = time.perf_counter()
                step()
                taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    training = model.training
    model.train()
    own, reference = seconds(""), seconds("reference")
    model.train(training)
    return {"seconds": own, "reference_seconds": reference, "times": reference / own}

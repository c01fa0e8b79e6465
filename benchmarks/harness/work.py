# SPDX-License-Identifier: Apache-2.0
"""The least that a case can cost: bytes that must move, and arithmetic.

Bytes: every input read once and every output written once, nothing else. Over the copy bandwidth
they give the floor in seconds. Backward reads the inputs again: nothing is stored between.

Arithmetic: that of the fewest operations we know (for rcu with c = 1 the table of 16 nodes, not the
attention matrix), counted per voxel and rounded. It only places a case on the roofline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

_TABLE_NODES = 16


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def residual_map(
    image: Tensor, prediction: Tensor, hidden: Tensor, *, backward: bool, **options: object
) -> Work:
    """Only the draws that count have to be read; every gradient has to be written."""
    counted = float(hidden.float().mean())
    shown = int(counted * prediction.nbytes)
    values = counted * prediction.numel()
    work = Work(shown + 2 * image.nbytes + hidden.nbytes, int(5 * values + 4 * image.numel()))
    if backward:
        moved = shown + prediction.nbytes + 3 * image.nbytes + hidden.nbytes
        work += Work(moved, int(8 * values + 8 * image.numel()))
    return work


def gcu(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    *,
    backward: bool,
    **options: object,
) -> Work:
    """Interpolation counts 6 operations a value: three axes, each shared by neighbors."""
    map_bytes = skip.nbytes // max(skip.shape[1], 1)
    inputs = _bytes(skip, deep, skip_gate, deep_gate)
    work = Work(inputs + skip.nbytes + map_bytes, 16 * skip.numel())
    if backward:
        work += Work(2 * inputs + skip.nbytes + map_bytes, 40 * skip.numel())
    return work


def rcu(x: Tensor, residual: Tensor, *weights: Tensor, backward: bool, patch_size: object) -> Work:
    """The gradient of the residual map is not asked for."""
    query = weights[0]
    maps, heads, map_channels, channels = query.shape
    voxels = x.numel() // max(channels, 1)
    lanes = maps * heads
    flops = voxels * lanes * (4 * map_channels * channels + 5 * _TABLE_NODES + 20)
    inputs = _bytes(x, residual, *weights)
    work = Work(inputs + x.nbytes, flops)
    if backward:
        work += Work(inputs + 2 * x.nbytes + _bytes(*weights), 3 * flops)
    return work


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """Slope of a straight line through (log size, log cost): how the cost grows with the size.

    None for fewer than two different sizes.
    """
    logs = [(math.log(size), math.log(cost)) for size, cost in points]
    if len({size for size, _ in logs}) < 2:
        return None
    middle_x = sum(x for x, _ in logs) / len(logs)
    middle_y = sum(y for _, y in logs) / len(logs)
    up = sum((x - middle_x) * (y - middle_y) for x, y in logs)
    return up / sum((x - middle_x) ** 2 for x, _ in logs)

# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation and its adjoint, as the reference of ``gcu`` needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upsample(deep: Tensor, size: Sequence[int]) -> Tensor:
    """``deep`` [B, C, *S'] interpolated linearly to [B, C, *size], ``align_corners=False``.

    One axis after the other, at the exact positions of :func:`positions`. ``F.interpolate`` takes
    them in float32 for float32 data, off by up to 1e-5 voxels, which shows in single voxels; and it
    multiplies by weights of 0, so that NaN and Inf spread to voxels that they do not belong to.
    """
    for axis, wanted in enumerate(size, start=2):
        if deep.shape[axis] == wanted:
            continue
        low, high, fraction = positions(int(wanted), int(deep.shape[axis]))
        fraction = fraction.to(deep).view(-1, *[1] * (deep.ndim - axis - 1))
        below = deep.index_select(axis, low.to(deep.device))
        above = deep.index_select(axis, high.to(deep.device))
        # What weighs nothing may be Inf, which times 0 is NaN.
        deep = below * (1 - fraction) + (above * fraction).masked_fill(fraction == 0, 0)
    return deep


def upsample_adjoint(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of :func:`upsample`: gradient [B, C, *S] to gradient of deep [B, C, *size].

    PyTorch's own backward scatters with atomics on CUDA, so its bits change from run to run. Here
    every deep voxel gathers: along one axis at a time it adds the voxels that it was spread to,
    in a fixed order.
    """
    for axis, target in enumerate(size, start=2):
        if grad.shape[axis] != target:
            grad = _adjoint_along(grad, axis, target)
    return grad


def _adjoint_along(grad: Tensor, axis: int, target: int) -> Tensor:
    source = grad.shape[axis]
    low, high, fraction = positions(source, target)
    # touches[j, i]: the weight of deep voxel j in voxel i. Each row is one short run of voxels.
    touches = torch.zeros(target, source, dtype=torch.float64)
    voxels = torch.arange(source)
    touches.index_put_((low, voxels), 1 - fraction, accumulate=True)
    touches.index_put_((high, voxels), fraction, accumulate=True)
    first = (touches != 0).to(torch.int8).argmax(dim=1)
    longest = int((touches != 0).sum(dim=1).max())

    shape = [1] * grad.ndim
    shape[axis] = target
    total = None
    for offset in range(longest):
        index = (first + offset).clamp(max=source - 1)
        weight = touches.gather(1, index[:, None])[:, 0]
        weight = torch.where(first + offset < source, weight, 0.0)
        term = grad.index_select(axis, index.to(grad.device))
        weight = weight.to(grad).view(shape)
        # NaN that weighs nothing stays where it is.
        term = torch.where(weight != 0, term * weight, 0)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def positions(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two deep voxels (of ``target``) around each of ``source`` voxels, and the fraction.

    In whole numbers, so that a voxel on a deep voxel has a fraction of exactly 0. The two are one
    where the other weighs nothing.
    """
    centers = ((2 * torch.arange(source) + 1) * target - source).clamp(min=0)
    low = (centers // (2 * source)).clamp(max=target - 1)
    rest = torch.where(low < target - 1, centers - low * (2 * source), 0)
    return low, torch.where(rest > 0, low + 1, low), rest.double() / (2 * source)

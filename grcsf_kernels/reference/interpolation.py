# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation and its adjoint, as the reference of ``gcu`` needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MODES = {4: "bilinear", 5: "trilinear"}


def upsample(deep: Tensor, size: Sequence[int]) -> Tensor:
    """``deep`` [B, C, *S'] interpolated linearly to [B, C, *size], ``align_corners=False``.

    For float32 data PyTorch takes the positions in float32. They are exact where the sizes differ
    by a power of two; elsewhere they are off by up to 1e-5 voxels, which shows in single voxels,
    so the interpolation is taken in float64 there.
    """
    ratios = (own / wanted for own, wanted in zip(deep.shape[2:], size, strict=True))
    exact = all(math.frexp(ratio)[0] == 0.5 for ratio in ratios)
    up = F.interpolate(
        deep if exact else deep.double(),
        size=tuple(size),
        mode=_MODES[deep.ndim],
        align_corners=False,
    )
    return up.to(deep.dtype)


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
    low, high, fraction = _positions(source, target)
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
        term = term * weight.to(grad).view(shape)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _positions(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two deep voxels (of ``target``) around each of ``source`` voxels, and the fraction."""
    centers = (torch.arange(source, dtype=torch.float64) + 0.5) * (target / source) - 0.5
    centers = centers.clamp(min=0)
    low = centers.floor().long().clamp(max=target - 1)
    high = (low + 1).clamp(max=target - 1)
    return low, high, centers - low

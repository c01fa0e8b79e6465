# SPDX-License-Identifier: Apache-2.0
"""RCU attention only on patches whose importance score reaches a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grcsf_kernels.ops import RCUWeights, rcu
from grcsf_kernels.ops.checks import patch_tuple
from grcsf_kernels.ops.registration import without_autocast
from grcsf_kernels.patches import Region, regions


def sparse_rcu(
    x: Tensor,
    maps: Tensor,
    weights: RCUWeights,
    patch_size: int | Sequence[int] | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """:func:`grcsf_kernels.rcu` where the score of a patch is not below ``threshold``, else x.

    The scores come first, from the means of all patches. The patches that remain are gathered,
    those of one shape (edge patches are smaller) in one batch, and each is a volume of one patch
    for the operator.

    Args:
        x: [B, C, *S].
        maps: [B, K, *S] or [B, K, c, *S], of the dtype of ``x``.
        weights: those of the operator.
        patch_size: as for the operator.
        threshold: from 0 to 1.

    Returns:
        The result [B, C, *S] and all scores [B, *G], also of patches that were left out.
    """
    if maps.ndim == x.ndim:
        maps = maps.unsqueeze(2)
    count, map_channels = maps.shape[1:3]
    flat = maps.flatten(1, 2)
    space = x.shape[2:]
    sizes = patch_tuple("rcu", patch_size, len(space)) or space
    sizes = [max(1, min(patch, size)) for patch, size in zip(sizes, space, strict=True)]
    grid = [-(-size // patch) for size, patch in zip(space, sizes, strict=True)]
    _, _, _, _, weight1, bias1, weight2, bias2 = weights

    out = x.clone()
    scores = weight1.new_empty((x.shape[0], *grid))
    for region in regions(space, sizes):
        if 0 in region.counts:
            continue
        own, other = _patches(x, region), _patches(flat, region)
        with without_autocast(x.device.type):
            found = _scores(own, other, weight1, bias1, weight2, bias2)
        scores[region.grid] = found
        chosen = ~(found < threshold)  # a score of NaN leaves no patch out: it has to show
        if not chosen.any():
            continue
        # One sample for each patch now: its bias is that of the sample it came from.
        own_weights = weights._replace(score_hidden_bias=bias1[chosen.nonzero()[:, 0]])
        chosen_maps = other[chosen].unflatten(1, (count, map_channels))
        compensated, _ = rcu(own[chosen], chosen_maps, own_weights, patch_size=None)
        _patches(out, region)[chosen] = compensated.to(out.dtype)  # autocast lowers it
    return out, scores


def _patches(volume: Tensor, region: Region) -> Tensor:
    """A view [B, *counts, n, *patch] of the region of ``volume`` [B, n, *S]."""
    block, axes = volume[region.space], len(region.patch)
    for axis in reversed(range(axes)):
        block = block.unflatten(2 + axis, (region.counts[axis], region.patch[axis]))
    counts, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return block.permute(0, *counts, 1, *inner)


def _scores(own: Tensor, other: Tensor, *weights: Tensor) -> Tensor:
    """[B, *counts] from patches of features and of maps: the operator's formula."""
    weight1, bias1, weight2, bias2 = weights
    axes = tuple(range(-(own.ndim - 2) // 2, 0))
    means = torch.cat([part.mean(axes, dtype=weight1.dtype) for part in (own, other)], dim=-1)
    bias = bias1.view(bias1.shape[0], *[1] * len(axes), bias1.shape[1])
    hidden = torch.relu(means @ weight1.mT + bias)
    return torch.sigmoid(hidden @ weight2 + bias2)

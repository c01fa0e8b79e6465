# SPDX-License-Identifier: Apache-2.0
"""``rcu`` in Triton without tables: attention summed directly, for any number of map channels.

The kernels are in ``forward_kernels.py`` (forward), ``backward_kernels.py``,
``map_gradient.py`` (the map's gradient) and ``means.py``; the score of a patch is computed in
``score.py``.

Work grows with voxels times voxels of a patch. Extra memory: the means of patches; backward, at
most ``_SHARE`` of grad_x for partial sums of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.triton.launch import blocks, launch
from grcsf_kernels.triton.rcu.direct.backward_kernels import grcsf_rcu_attend_backward
from grcsf_kernels.triton.rcu.direct.forward_kernels import grcsf_rcu_attend_forward
from grcsf_kernels.triton.rcu.direct.map_gradient import map_gradient
from grcsf_kernels.triton.rcu.direct.tiles import geometry, tiles
from grcsf_kernels.triton.rcu.means import add_means_gradient, means
from grcsf_kernels.triton.rcu.score import score_gradients, scores_of

__all__ = ["backward", "forward", "map_gradient", "means"]

# Partial sums of the weights' gradients: this share of grad_x, but no fewer programs than these.
_SHARE = 0.04
_LEAST_SLOTS = 128


def forward(
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
    patch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    own = geometry(x, patch)
    maps, heads, map_channels, channels = query_weight.shape
    averages = means(x, residual, patch)
    scores = scores_of(averages, score_weight1, score_bias1, score_weight2, score_bias2)
    out = torch.empty_like(x)
    constants = tiles("forward", own, x, residual, map_channels)
    query_blocks = blocks(own.voxels, constants["BLOCK_Q"])
    groups = blocks(channels, constants["BLOCK_C"])
    launch(
        grcsf_rcu_attend_forward,
        own.patches * query_blocks * groups,
        x,
        residual,
        query_weight,
        query_bias,
        value_weight,
        value_bias.sum(dim=0),
        scores,
        averages,
        out,
        *own.runtime(),
        maps,
        heads,
        map_channels,
        query_blocks,
        groups,
        **constants,
    )
    grid = [blocks(size, size_of) for size, size_of in zip(x.shape[2:], patch, strict=True)]
    return out, scores.view(x.shape[0], *grid)


def backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
    patch: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of all ten tensors, in the order of the operator (None where not needed)."""
    own = geometry(x, patch)
    maps, heads, map_channels, channels = query_weight.shape
    lanes = maps * heads * map_channels
    averages = means(x, residual, patch)
    needs_x, needs_weights = needs[0], any(needs[2:6])
    constants = tiles("backward", own, x, residual, map_channels)
    query_blocks = blocks(own.voxels, constants["BLOCK_Q"])
    groups = blocks(channels, constants["BLOCK_C"])
    items = own.patches * query_blocks
    columns = (2 * channels + 1) * lanes + channels
    affordable = int(_SHARE * x.numel() * x.element_size() / (columns * averages.element_size()))
    slots = min(items, max(affordable, _LEAST_SLOTS)) if needs_weights else items

    grad_x = torch.empty_like(x) if needs_x else None
    partial = averages.new_zeros((slots if needs_weights else 0, columns))
    grad_score = averages.new_empty((own.patches, query_blocks * groups))
    launch(
        grcsf_rcu_attend_backward,
        slots * groups,
        grad_out,
        x,
        residual,
        query_weight,
        query_bias,
        value_weight,
        value_bias.sum(dim=0),
        scores,
        averages,
        x if grad_x is None else grad_x,
        partial,
        grad_score,
        *own.runtime(),
        maps,
        heads,
        map_channels,
        query_blocks,
        groups,
        slots,
        items,
        NEEDS_X=needs_x,
        NEEDS_WEIGHTS=needs_weights,
        **constants,
    )
    sizes = [channels * lanes, channels * lanes, lanes, channels]
    of_query, of_value, of_query_bias, of_value_bias = partial.sum(dim=0).split(sizes)
    grad_means, *of_scores = score_gradients(
        grad_scores.flatten() + grad_score.sum(dim=1),
        scores.flatten(),
        averages,
        score_weight1,
        score_bias1,
        score_weight2,
    )
    if grad_x is not None:
        add_means_gradient(grad_x, grad_means, patch)
    grad_residual = None
    if needs[1]:
        grad_residual = map_gradient(
            grad_out,
            scores,
            x,
            residual,
            query_weight,
            query_bias,
            value_weight,
            patch,
            means=averages,
            grad_means=grad_means,
        ).to(residual.dtype)
    grads: tuple[Any, ...] = (
        grad_x,
        grad_residual,
        of_query.view(query_weight.shape),
        of_query_bias.view(query_bias.shape),
        of_value.view(maps, heads, map_channels, channels).permute(0, 3, 1, 2).contiguous(),
        of_value_bias.expand(maps, -1).contiguous(),
        *of_scores,
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

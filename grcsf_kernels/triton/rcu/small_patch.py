# SPDX-License-Identifier: Apache-2.0
"""``rcu`` with one program a patch: how its kernels are started (``small_patch_kernels.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.triton import launch
from grcsf_kernels.triton.rcu.direct.map_gradient import map_gradient
from grcsf_kernels.triton.rcu.direct.tiles import Geometry, geometry
from grcsf_kernels.triton.rcu.score import score_gradients
from grcsf_kernels.triton.rcu.small_patch_kernels import (
    grcsf_rcu_patch_backward,
    grcsf_rcu_patch_forward,
)

# (step of a table) * (range of r): the spline's error is below the rounding of the data
# (docs/operators.md). float64 would need thousands of nodes: direct sums.
STEP = {torch.float32: 0.25, torch.bfloat16: 0.5, torch.float16: 0.5}


def column_constants(query_weight: Tensor, precision: str) -> dict[str, int]:
    """How the kernels lay out channels, maps and heads."""
    maps, heads, _, channels = query_weight.shape
    columns = launch.power_of_2(maps * heads)
    return {
        "C": channels,
        "K": maps,
        "HEADS": heads,
        "N": columns,
        "PARTS": 1 if precision == "float64" else max(1, 16 // columns),
    }


def patch_constants(
    kernel: str, place: Geometry, x: Tensor, residual: Tensor, weights: Sequence[Tensor]
) -> dict[str, Any]:
    """Compile-time constants of a kernel of ``small_patch_kernels.py``."""
    precision = launch.precision(x)
    columns = column_constants(weights[0], precision)
    hidden = weights[4].shape[0]
    padded = launch.power_of_2(place.voxels, 16)
    own = launch.parameters("rcu", kernel, x)
    own["BLOCK_V"] = min(own["BLOCK_V"], padded)
    own["BLOCK_J"] = min(own["BLOCK_J"], padded)
    own["KEYS"] = min(own["KEYS"], padded)
    own["BLOCK_C"] = min(own["BLOCK_C"], launch.power_of_2(columns["C"], 16))
    return {
        **dict(zip(("PZ", "PY", "PX"), place.patch, strict=True)),
        **columns,
        "K2": launch.power_of_2(columns["K"]),
        "M": hidden,
        "M2": launch.power_of_2(hidden),
        **own,
        "STEP": STEP.get(x.dtype, 1.0),
        "EVEN": place.whole and place.voxels % max(own["BLOCK_V"], own["BLOCK_J"]) == 0,
        "WIDE": launch.wide(x, residual),
        "PRECISION": precision,
    }


def weight_slots(query_weight: Tensor, programs: int) -> list[Tensor]:
    """Zeros in which each program adds up its gradients of weights.

    Of query_weight and query_bias [programs, K, heads, 1, (C)], of value_weight in the order of
    query_weight, and of value_bias [programs, C], which is the same for all maps.
    """
    *lanes, channels = query_weight.shape
    shapes = ((*lanes, channels), lanes, (*lanes, channels), (channels,))
    return [query_weight.new_zeros((programs, *shape)) for shape in shapes]


def gradients(
    grad_x: Tensor,
    slots: Sequence[Tensor],
    of_score: Sequence[Tensor],
    grad_means: Tensor,
    means: Tensor,
    grad_out: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor],
    patch: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """All that backward returns: sums of ``slots``, and if asked for the gradient of the map."""
    grad_residual = None
    if needs[1]:
        query_weight, query_bias, value_weight = weights[:3]
        grad_residual = map_gradient(
            grad_out,
            scores,
            x,
            residual,
            query_weight,
            query_bias,
            value_weight,
            patch,
            means=means,
            grad_means=grad_means,
        ).to(residual.dtype)
    of_query, of_query_bias, of_value, of_value_bias = (slot.sum(dim=0) for slot in slots)
    grads = (
        grad_x,
        grad_residual,
        of_query,
        of_query_bias,
        of_value.permute(0, 3, 1, 2).contiguous(),
        of_value_bias.expand(of_query.shape[0], -1).contiguous(),
        *of_score,
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def forward(x: Tensor, residual: Tensor, *weights_and_patch: Any) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    *weights, patch = weights_and_patch
    place = geometry(x, patch)
    out = torch.empty_like(x)
    scores = weights[0].new_empty((x.shape[0], *place.grid[3 - len(patch) :]))
    constants = patch_constants("patch_forward", place, x, residual, weights)
    programs = min(scores.numel(), constants.pop("PROGRAMS"))
    table = weights[0].new_empty((programs, constants["K"], constants["T"], 2))
    launch.launch(
        grcsf_rcu_patch_forward,
        programs,
        x,
        residual,
        *weights,
        table,
        out,
        scores,
        *place.sizes,
        *place.grid,
        *place.strides,
        prod(place.sizes),
        scores.numel(),
        programs,
        **constants,
    )
    return out, scores


def backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    *weights_and_options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of all ten tensors, in the order of the operator (None where not needed)."""
    *weights, patch, needs = weights_and_options
    query_weight = weights[0]
    place = geometry(x, patch)
    constants = patch_constants("patch_backward", place, x, residual, weights)
    patches = place.patches
    programs = min(patches, constants.pop("PROGRAMS"))
    maps, _, _, channels = query_weight.shape
    grad_x = torch.empty_like(x)
    table = query_weight.new_empty((programs, maps, constants["T"], 3))
    means = query_weight.new_zeros((patches, channels + maps))
    grad_score = query_weight.new_empty((patches,))
    mean_gradient = query_weight.new_empty((programs, channels))
    slots = weight_slots(query_weight, programs)
    launch.launch(
        grcsf_rcu_patch_backward,
        programs,
        grad_out,
        grad_scores,
        scores,
        x,
        residual,
        *weights[:7],
        table,
        grad_x,
        means,
        grad_score,
        mean_gradient,
        *slots,
        *place.sizes,
        *place.grid,
        *place.strides,
        prod(place.sizes),
        patches,
        programs,
        **constants,
    )
    grad_means, *of_score = score_gradients(grad_score, scores.flatten(), means, *weights[4:7])
    return gradients(
        grad_x, slots, of_score, grad_means, means, grad_out, scores, x, residual, weights, patch,
        needs,
    )  # fmt: skip

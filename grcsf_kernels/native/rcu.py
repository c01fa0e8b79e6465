# SPDX-License-Identifier: Apache-2.0
"""``rcu`` on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grcsf_kernels.native import capsule, library, resources, result_like, sizes_3d, volume


def _residual_volume(residual: Tensor) -> Tensor:
    """[B, K, c, H, W] as a volume of depth 1, without a copy."""
    return residual.unsqueeze(3) if residual.ndim == 5 else residual


def _inputs(x: Tensor, residual: Tensor, weights: Sequence[Tensor], patch: Sequence[int]) -> Any:
    return (
        capsule(volume(x)),
        capsule(_residual_volume(residual)),
        [capsule(weight) for weight in weights],
        sizes_3d(list(patch)),
        resources(x),
    )


def _grid(scores: Tensor) -> Tensor:
    """[B, gh, gw] as [B, 1, gh, gw], without a copy."""
    return scores.unsqueeze(1) if scores.ndim == 3 else scores


def forward(x: Tensor, residual: Tensor, *weights_and_patch: Any) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    *weights, patch = weights_and_patch
    out = result_like(x)
    grid = [-(-size // own) for size, own in zip(x.shape[2:], patch, strict=True)]
    scores = weights[0].new_empty((x.shape[0], *grid))
    library().rcu_forward(
        *_inputs(x, residual, weights, patch), capsule(volume(out)), capsule(_grid(scores))
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
    grad_x = result_like(x) if needs[0] else None
    grad_residual = result_like(residual) if needs[1] else None
    grad_weights = [result_like(weight) for weight in weights]
    library().rcu_backward(
        capsule(volume(grad_out)),
        capsule(_grid(grad_scores)),
        capsule(_grid(scores)),
        *_inputs(x, residual, weights, patch),
        capsule(None if grad_x is None else volume(grad_x)),
        capsule(None if grad_residual is None else _residual_volume(grad_residual)),
        [capsule(grad) for grad in grad_weights],
    )
    grads = (grad_x, grad_residual, *grad_weights)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

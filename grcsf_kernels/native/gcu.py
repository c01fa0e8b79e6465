# SPDX-License-Identifier: Apache-2.0
"""``gcu`` on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grcsf_kernels.native import capsule, library, resources, result_like, volume


def forward(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(compensated, dissimilarity)``; see :func:`grcsf_kernels.gcu`."""
    compensated = result_like(skip)
    dissimilarity = skip.new_empty((skip.shape[0], 1, *skip.shape[2:]))
    library().gcu_forward(
        capsule(volume(skip)),
        capsule(volume(deep)),
        capsule(skip_gate),
        capsule(deep_gate),
        compensation == "similarity",
        eps,
        resources(skip),
        capsule(volume(compensated)),
        capsule(volume(dissimilarity)),
    )
    return compensated, dissimilarity


def backward(
    grad_compensated: Tensor,
    grad_dissimilarity: Tensor,
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of skip, deep, skip_gate and deep_gate (None where not needed)."""
    grad_skip = result_like(skip) if needs[0] else None
    grad_deep = result_like(deep) if needs[1] else None
    grad_skip_gate = result_like(skip_gate) if needs[2] else None
    grad_deep_gate = result_like(deep_gate) if needs[3] else None
    library().gcu_backward(
        capsule(volume(skip)),
        capsule(volume(deep)),
        capsule(skip_gate),
        capsule(deep_gate),
        compensation == "similarity",
        eps,
        resources(skip),
        capsule(volume(grad_compensated)),
        capsule(volume(grad_dissimilarity)),
        capsule(None if grad_skip is None else volume(grad_skip)),
        capsule(None if grad_deep is None else volume(grad_deep)),
        capsule(grad_skip_gate),
        capsule(grad_deep_gate),
    )
    return grad_skip, grad_deep, grad_skip_gate, grad_deep_gate

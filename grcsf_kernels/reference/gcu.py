# SPDX-License-Identifier: Apache-2.0
"""The definition of ``gcu`` in eager PyTorch, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.reference.interpolation import upsample, upsample_adjoint


def _gated(tensor: Tensor, gate: Tensor) -> Tensor:
    return tensor.to(gate.dtype) * gate.reshape(*gate.shape, *[1] * (tensor.ndim - 2))


def _norm(vectors: Tensor) -> Tensor:
    return (vectors * vectors).sum(dim=1, keepdim=True).sqrt_()


def forward(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(compensated, dissimilarity)``; see :func:`grcsf_kernels.gcu`."""
    gated = _gated(skip, skip_gate)
    up = upsample(_gated(deep, deep_gate), skip.shape[2:])
    norms = _norm(gated).clamp_(min=eps) * _norm(up).clamp_(min=eps)
    cosine = (gated * up).sum(dim=1, keepdim=True) / norms
    dissimilarity = 1 - cosine
    strength = dissimilarity if compensation == "dissimilarity" else cosine
    compensated = skip.to(compute_dtype(skip.dtype)) * (1 + strength)
    return compensated.to(skip.dtype), dissimilarity.to(skip.dtype)


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
    r"""Gradients of skip, deep, skip_gate and deep_gate (None where not needed).

    With :math:`m = \max(|f|, eps)`, :math:`n = \max(|up|, eps)` and :math:`g` the gradient that
    reaches the cosine,

    .. math:: \frac{\partial}{\partial f} = g \left( \frac{up}{m n} -
        [|f| > eps] \frac{\cos f}{|f|^2} \right)

    and the same with f and up exchanged. The upsampled tensor is made again, not stored.
    """
    compute = compute_dtype(skip.dtype)
    voxel_axes = tuple(range(2, skip.ndim))
    wide_skip, grad = skip.to(compute), grad_compensated.to(compute)
    gated = _gated(skip, skip_gate)
    up = upsample(_gated(deep, deep_gate), skip.shape[2:])
    gated_norm, up_norm = _norm(gated), _norm(up)
    norms = gated_norm.clamp(min=eps) * up_norm.clamp(min=eps)
    cosine = (gated * up).sum(dim=1, keepdim=True) / norms

    sign = -1 if compensation == "dissimilarity" else 1
    strength = 1 - cosine if compensation == "dissimilarity" else cosine
    grad_cosine = sign * (grad * wide_skip).sum(dim=1, keepdim=True)
    grad_cosine = grad_cosine - grad_dissimilarity.to(compute)
    cross = grad_cosine / norms

    def toward(own: Tensor, own_norm: Tensor, other: Tensor) -> Tensor:
        radial = grad_cosine * cosine / own_norm.square()
        return cross * other - (radial * own).masked_fill_(own_norm <= eps, 0)

    grad_skip = grad_deep = grad_skip_gate = grad_deep_gate = None
    if needs[0] or needs[2]:
        grad_gated = toward(gated, gated_norm, up)
        if needs[0]:
            grad_skip = (grad * (1 + strength) + _gated(grad_gated, skip_gate)).to(skip.dtype)
        if needs[2]:
            grad_skip_gate = (grad_gated * wide_skip).sum(dim=voxel_axes)
    if needs[1] or needs[3]:
        grad_scaled = upsample_adjoint(toward(up, up_norm, gated), deep.shape[2:])
        if needs[1]:
            grad_deep = _gated(grad_scaled, deep_gate).to(deep.dtype)
        if needs[3]:
            grad_deep_gate = (grad_scaled * deep.to(compute)).sum(dim=voxel_axes)
    return grad_skip, grad_deep, grad_skip_gate, grad_deep_gate

# SPDX-License-Identifier: Apache-2.0
"""``gcu``: the Global Compensation Unit, fused.

Source: GRCSF, Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels import dispatch
from grcsf_kernels.ops import checks, registration

COMPENSATIONS = ("dissimilarity", "similarity")


def gcu(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    *,
    compensation: str = "dissimilarity",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""Strengthen a skip where the deeper feature can no longer express it.

    With :math:`f = skip \cdot skip\_gate` and :math:`up` the linear interpolation of
    :math:`deep \cdot deep\_gate` to the size of the skip (``align_corners=False``), per voxel and
    over channels

    .. math:: \cos = \frac{\langle f, up \rangle}{\max(|f|, eps) \max(|up|, eps)}, \quad
        dissimilarity = 1 - \cos, \quad compensated = skip \, (1 + dissimilarity)

    The upsampled tensor never exists in memory. Differentiable once in all four tensors, from both
    outputs. Under autocast ``skip`` and ``deep`` are cast to the region's dtype and the gates to
    float32; the similarity is computed in float32 (float64 for float64 data).

    Args:
        skip: [B, C, H, W] or [B, C, D, H, W]; float32, float64, bfloat16 or float16.
        deep: [B, C, \*S'] of the same dtype, any size S' >= 1 per axis.
        skip_gate: [B, C] float32 (float64 with float64 data), usually from squeeze-and-excitation.
        deep_gate: [B, C], likewise.
        compensation: ``"dissimilarity"``, or ``"similarity"`` for skip * (1 + cos).
        eps: floor of the two norms, greater than 0; a zero vector has similarity 0.

    Returns:
        ``compensated`` [B, C, \*S] and ``dissimilarity`` [B, 1, \*S], both in the dtype and layout
        of ``skip``.

    Raises:
        TypeError: an argument is no tensor, or of a dtype other than the above.
        ValueError: shapes or devices that do not fit, an unknown ``compensation``, or an ``eps``
            whose square is 0 or infinite in the dtype of the gates.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461), global compensation
    unit.
    """
    checks.require_tensors("gcu", skip=skip, deep=deep, skip_gate=skip_gate, deep_gate=deep_gate)
    checks.require_options("gcu", str, compensation=compensation)
    checks.require_options("gcu", float, eps=eps)
    return torch.ops.grcsf.gcu(skip, deep, skip_gate, deep_gate, compensation=compensation, eps=eps)


def _check(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
) -> None:
    checks.check_data("gcu", "skip", skip)
    checks.check_data("gcu", "deep", deep)
    if deep.ndim != skip.ndim or deep.shape[:2] != skip.shape[:2]:
        raise ValueError(
            f"gcu: deep has shape {tuple(deep.shape)}, expected the batch, channels and number of "
            f"axes of skip, which has shape {tuple(skip.shape)}"
        )
    checks.check_like("gcu", "skip", skip, deep=deep)
    gates = {"skip_gate": skip_gate, "deep_gate": deep_gate}
    for name, gate in gates.items():
        checks.check_shape("gcu", name, gate, skip.shape[:2], "[B, C] of skip")
    checks.check_weights("gcu", "skip", skip, **gates)
    checks.check_option("gcu", "compensation", compensation, COMPENSATIONS)
    # The product of two norms is divided by, so the square of eps must be a number.
    checks.check_eps("gcu", eps, skip.dtype, power=2)


def _check_backward(
    grad_compensated: Tensor,
    grad_dissimilarity: Tensor,
    skip: Tensor,
    *arguments: Any,
) -> None:
    *others, needs = arguments
    _check(skip, *others)
    name = "gcu_backward"
    one_channel = (skip.shape[0], 1, *skip.shape[2:])
    for gradient, tensor, shape, meaning in (
        ("grad_compensated", grad_compensated, skip.shape, "the shape of skip"),
        ("grad_dissimilarity", grad_dissimilarity, one_channel, "[B, 1, *S] of skip"),
    ):
        checks.check_shape(name, gradient, tensor, shape, meaning)
        checks.check_like(name, "skip", skip, **{gradient: tensor})
    checks.check_needs(name, needs, 4)


def _forward(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    *,
    compensation: str = "dissimilarity",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    _check(skip, deep, skip_gate, deep_gate, compensation, eps)
    layout = checks.layout_of(skip)
    compensated, dissimilarity = dispatch.implementation("gcu", skip).forward(
        checks.dense(skip, layout),
        checks.dense(deep, layout),
        checks.dense(skip_gate),
        checks.dense(deep_gate),
        compensation,
        eps,
    )
    return checks.dense(compensated, layout), checks.dense(dissimilarity)


def _forward_fake(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    *,
    compensation: str = "dissimilarity",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    _check(skip, deep, skip_gate, deep_gate, compensation, eps)
    one_channel = (skip.shape[0], 1, *skip.shape[2:])
    return (
        checks.empty(skip.shape, skip, checks.layout_of(skip)),
        checks.empty(one_channel, skip, torch.contiguous_format),
    )


def _backward(
    grad_compensated: Tensor,
    grad_dissimilarity: Tensor,
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(
        grad_compensated,
        grad_dissimilarity,
        *(skip, deep, skip_gate, deep_gate, compensation, eps, needs),
    )
    layout = checks.layout_of(skip)
    grads = dispatch.implementation("gcu", skip).backward(
        checks.dense(grad_compensated, layout),
        checks.dense(grad_dissimilarity),
        checks.dense(skip, layout),
        checks.dense(deep, layout),
        checks.dense(skip_gate),
        checks.dense(deep_gate),
        compensation,
        eps,
        needs,
    )
    grad_skip, grad_deep, grad_skip_gate, grad_deep_gate = grads
    return (
        registration.none_to_empty(grad_skip, skip, layout),
        registration.none_to_empty(grad_deep, deep, layout),
        registration.none_to_empty(grad_skip_gate, skip_gate),
        registration.none_to_empty(grad_deep_gate, deep_gate),
    )


def _backward_fake(
    grad_compensated: Tensor,
    grad_dissimilarity: Tensor,
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(
        grad_compensated,
        grad_dissimilarity,
        *(skip, deep, skip_gate, deep_gate, compensation, eps, needs),
    )
    layout = checks.layout_of(skip)
    gates = torch.contiguous_format
    return tuple(  # type: ignore[return-value]
        checks.empty(like.shape if need else (0,), like, form if need else gates)
        for like, form, need in zip(
            (skip, deep, skip_gate, deep_gate), (layout, layout, gates, gates), needs, strict=True
        )
    )


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = (keyword_only_inputs["compensation"], keyword_only_inputs["eps"])


def _autograd(ctx: Any, grad_compensated: Tensor, grad_dissimilarity: Tensor) -> Any:
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.grcsf.gcu_backward(
        grad_compensated, grad_dissimilarity, *ctx.saved_tensors, *ctx.options, needs
    )
    return registration.empty_to_none(grads, needs)


def _autocast(dtype: torch.dtype, *args: Tensor) -> tuple[Tensor, ...]:
    skip, deep, skip_gate, deep_gate = args
    return (
        registration.cast_data(skip, dtype),
        registration.cast_data(deep, dtype),
        registration.cast_weight(skip_gate),
        registration.cast_weight(deep_gate),
    )


registration.define(
    "gcu",
    "(Tensor skip, Tensor deep, Tensor skip_gate, Tensor deep_gate, *, "
    'str compensation="dissimilarity", float eps=1e-6) -> (Tensor, Tensor)',
    _forward,
    _forward_fake,
)
registration.define(
    "gcu_backward",
    "(Tensor grad_compensated, Tensor grad_dissimilarity, Tensor skip, Tensor deep, "
    "Tensor skip_gate, Tensor deep_gate, str compensation, float eps, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
registration.register_autograd("gcu", _autograd, _setup_context)
registration.register_autocast("gcu", _autocast)

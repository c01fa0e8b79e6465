# SPDX-License-Identifier: Apache-2.0
"""The definition of ``residual_map`` in eager PyTorch, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.patches import patchify, unpatchify


def _draw_weights(hidden: Tensor | None, prediction: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, B, L, 1]: what each draw of a patch contributes to the average over draws."""
    if hidden is None:
        draws, batch, tokens, _ = prediction.shape
        return torch.full((1, 1, 1, 1), 1 / draws, dtype=dtype, device=prediction.device).expand(
            draws, batch, tokens, 1
        )
    counts = hidden.sum(dim=0, keepdim=True).clamp(min=1)
    return (hidden.to(dtype) / counts)[..., None]


def _statistics(target: Tensor, normalized_target: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and offset [B, L, 1] that turn a prediction into intensities."""
    if not normalized_target:
        one = torch.ones((1, 1, 1), dtype=target.dtype, device=target.device)
        return one, torch.zeros_like(one)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (variance + eps).sqrt(), mean


def _sign(difference: Tensor) -> Tensor:
    """The derivative of the absolute value; NaN stays NaN, of which torch makes 0."""
    return torch.where(difference.isnan(), difference, difference.sgn())


def forward(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
) -> Tensor:
    """``residual`` [B, C, *S]; see :func:`grcsf_kernels.residual_map`."""
    dtype = compute_dtype(image.dtype)
    target = patchify(image, patch_size).to(dtype)
    weights = _draw_weights(hidden, prediction, dtype)
    scale, offset = _statistics(target, normalized_target, eps)
    total = torch.zeros_like(target)
    # Draw by draw, so that the extra memory is that of one volume.
    for drawn, weight in zip(prediction, weights, strict=True):
        reconstruction = drawn.to(dtype) * scale + offset
        if average == "residuals":
            reconstruction = (target - reconstruction).abs_()
        total += torch.where(weight > 0, weight * reconstruction, 0)
    if average == "reconstructions":
        total = torch.where(weights.sum(dim=0) > 0, (target - total).abs_(), 0)
    return unpatchify(total, patch_size, image.shape).to(image.dtype)


def backward(
    grad_residual: Tensor,
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of image and prediction (None where not needed).

    With a normalized target the image also acts through the mean and the variance of its patches.
    """
    dtype = compute_dtype(image.dtype)
    grad = patchify(grad_residual, patch_size).to(dtype)
    target = patchify(image, patch_size).to(dtype)
    weights = _draw_weights(hidden, prediction, dtype)
    scale, offset = _statistics(target, normalized_target, eps)

    grad_target = torch.zeros_like(target)
    grad_scale = torch.zeros_like(target[..., :1])
    grad_offset = torch.zeros_like(grad_scale)
    grad_prediction = torch.empty_like(prediction) if needs[1] else None

    sign = None
    if average == "reconstructions":
        mean_reconstruction = torch.zeros_like(target)
        for drawn, weight in zip(prediction, weights, strict=True):
            shown = drawn.to(dtype) * scale + offset
            mean_reconstruction += torch.where(weight > 0, weight * shown, 0)
        sign = _sign(target - mean_reconstruction)

    for draw, (drawn, weight) in enumerate(zip(prediction, weights, strict=True)):
        drawn = drawn.to(dtype)
        own_sign = _sign(target - (drawn * scale + offset)) if sign is None else sign
        reaching = torch.where(weight > 0, grad * weight * own_sign, 0)
        grad_target += reaching
        if grad_prediction is not None:
            grad_prediction[draw] = torch.where(weight > 0, -reaching * scale, 0)
        if normalized_target:
            shown = torch.where(weight > 0, drawn, 0)
            grad_scale -= (reaching * shown).sum(dim=-1, keepdim=True)
            grad_offset -= reaching.sum(dim=-1, keepdim=True)

    grad_image = None
    if needs[0]:
        if normalized_target:
            values = target.shape[-1]
            grad_target += grad_offset / values
            grad_target += grad_scale * (target - offset) / ((values - 1) * scale)
        grad_image = unpatchify(grad_target, patch_size, image.shape).to(image.dtype)
    return grad_image, grad_prediction

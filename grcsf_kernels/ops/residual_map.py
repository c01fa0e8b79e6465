# SPDX-License-Identifier: Apache-2.0
"""``residual_map``: what a masked autoencoder fails to reconstruct, averaged over mask draws."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels import dispatch
from grcsf_kernels.ops import checks, registration

AVERAGES = ("residuals", "reconstructions")


def residual_map(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None = None,
    *,
    patch_size: int | Sequence[int],
    normalized_target: bool = False,
    average: str = "residuals",
    eps: float = 1e-6,
) -> Tensor:
    r"""Voxel-wise difference between an image and its reconstructions, averaged over mask draws.

    Unpatchify, undo of the target's normalization, difference and average in one pass; the
    reconstructed volumes never exist in memory. Differentiable once in ``image`` and
    ``prediction``. Under autocast ``image`` is raised to the precision of ``prediction`` where it
    is lower, and nothing else is cast.

    Args:
        image: [B, C, H, W] or [B, C, D, H, W], sizes divisible by ``patch_size``; float32,
            float64, bfloat16 or float16.
        prediction: [N, B, L, P * C] for N mask draws; L = prod(S / patch_size) patches in row-major
            grid order, P = prod(patch_size). Inside a token the voxel is the slow axis (row-major)
            and the channel the fast one. Of the image's dtype, or of a lower precision.
        hidden: [N, B, L] bool, true where the patch was hidden from the encoder in that draw. Only
            those draws count; a patch that was never hidden gives 0. None: every draw counts.
        patch_size: voxels per axis, an integer or one for each axis.
        normalized_target: the prediction is in units of the image patch's own mean and unbiased
            variance over all its P * C values; it is undone as
            ``prediction * sqrt(var + eps) + mean``.
        average: ``"residuals"`` for the mean over draws of ``|image - reconstruction|``,
            ``"reconstructions"`` for ``|image - mean over draws of the reconstruction|``.
        eps: added to the variance, greater than 0.

    Returns:
        ``residual`` [B, C, \*S] in the dtype and layout of ``image``.

    Raises:
        TypeError: an argument is no tensor, or of a dtype other than the above.
        ValueError: shapes or devices that do not fit, an unknown ``average``, an ``eps`` that is
            0 or infinite in the dtype of the sums, or ``normalized_target`` with patches of a
            single value, which have no variance.

    Source: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377) for the token order and the
    normalized target; GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461) for the
    residual map.
    """
    checks.require_tensors("residual_map", image=image, prediction=prediction)
    if hidden is not None:
        checks.require_tensors("residual_map", hidden=hidden)
    checks.require_options("residual_map", str, average=average)
    checks.require_options("residual_map", bool, normalized_target=normalized_target)
    checks.require_options("residual_map", float, eps=eps)
    sizes = checks.patch_tuple("residual_map", patch_size, image.ndim - 2)
    if sizes is None:
        raise TypeError(
            "residual_map: patch_size is None, expected an integer or one for each axis"
        )
    return torch.ops.grcsf.residual_map(
        image,
        prediction,
        hidden,
        patch_size=sizes,
        normalized_target=normalized_target,
        average=average,
        eps=eps,
    )


def _check(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
) -> None:
    name = "residual_map"
    checks.check_data(name, "image", image)
    checks.check_option(name, "average", average, AVERAGES)
    checks.check_eps(name, eps, image.dtype)
    space = image.shape[2:]
    sizes = checks.patch_tuple(name, patch_size, len(space))
    assert sizes is not None
    if any(size % patch for size, patch in zip(space, sizes, strict=True)):
        raise ValueError(
            f"{name}: image has shape {tuple(image.shape)}, "
            f"expected spatial sizes divisible by patch_size {tuple(sizes)}"
        )
    tokens = prod(size // patch for size, patch in zip(space, sizes, strict=True))
    values = prod(sizes) * image.shape[1]
    if normalized_target and values < 2:
        raise ValueError(
            f"{name}: normalized_target with patch_size {tuple(sizes)} and {image.shape[1]} "
            "channel has one value per patch and no variance, expected at least two values"
        )
    draws = prediction.shape[0] if prediction.ndim else 0
    expected = (max(draws, 1), image.shape[0], tokens, values)
    checks.check_shape(name, "prediction", prediction, expected, "[N, B, L, P * C], N >= 1")
    if prediction.dtype not in checks.DATA_DTYPES or (
        torch.finfo(prediction.dtype).eps < torch.finfo(image.dtype).eps
    ):
        raise TypeError(
            f"{name}: prediction is {prediction.dtype}, expected {image.dtype}, the dtype of "
            "image, or a floating dtype of lower precision"
        )
    checks.check_device(name, "image", image, prediction=prediction)
    if hidden is not None:
        if hidden.dtype != torch.bool:
            raise TypeError(f"{name}: hidden is {hidden.dtype}, expected torch.bool")
        checks.check_shape(name, "hidden", hidden, prediction.shape[:3], "[N, B, L]")
        checks.check_device(name, "image", image, hidden=hidden)


def _check_backward(grad_residual: Tensor, image: Tensor, *arguments: Any) -> None:
    *others, needs = arguments
    _check(image, *others)
    name = "residual_map_backward"
    checks.check_shape(name, "grad_residual", grad_residual, image.shape, "the shape of image")
    checks.check_like(name, "image", image, grad_residual=grad_residual)
    checks.check_needs(name, needs, 2)


def _dense_arguments(
    image: Tensor, prediction: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        checks.dense(image, checks.layout_of(image)),
        checks.dense(prediction),
        None if hidden is None else checks.dense(hidden),
    )


def _forward(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None = None,
    *,
    patch_size: Sequence[int],
    normalized_target: bool = False,
    average: str = "residuals",
    eps: float = 1e-6,
) -> Tensor:
    _check(image, prediction, hidden, patch_size, normalized_target, average, eps)
    sizes = checks.patch_tuple("residual_map", patch_size, image.ndim - 2)
    residual = dispatch.implementation("residual_map", image).forward(
        *_dense_arguments(image, prediction, hidden), sizes, normalized_target, average, eps
    )
    return checks.dense(residual, checks.layout_of(image))


def _forward_fake(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None = None,
    *,
    patch_size: Sequence[int],
    normalized_target: bool = False,
    average: str = "residuals",
    eps: float = 1e-6,
) -> Tensor:
    _check(image, prediction, hidden, patch_size, normalized_target, average, eps)
    return checks.empty(image.shape, image, checks.layout_of(image))


def _backward(
    grad_residual: Tensor,
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    _check_backward(
        *(grad_residual, image, prediction, hidden, patch_size),
        *(normalized_target, average, eps, needs),
    )
    layout = checks.layout_of(image)
    sizes = checks.patch_tuple("residual_map", patch_size, image.ndim - 2)
    grad_image, grad_prediction = dispatch.implementation("residual_map", image).backward(
        checks.dense(grad_residual, layout),
        *_dense_arguments(image, prediction, hidden),
        sizes,
        normalized_target,
        average,
        eps,
        needs,
    )
    return (
        registration.none_to_empty(grad_image, image, layout),
        registration.none_to_empty(grad_prediction, prediction),
    )


def _backward_fake(
    grad_residual: Tensor,
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    _check_backward(
        *(grad_residual, image, prediction, hidden, patch_size),
        *(normalized_target, average, eps, needs),
    )
    contiguous = torch.contiguous_format
    layout = checks.layout_of(image)
    return (
        checks.empty(image.shape, image, layout) if needs[0] else image.new_empty((0,)),
        checks.empty(prediction.shape, prediction, contiguous)
        if needs[1]
        else prediction.new_empty((0,)),
    )


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    options = keyword_only_inputs
    ctx.options = (
        options["patch_size"],
        options["normalized_target"],
        options["average"],
        options["eps"],
    )


def _autograd(ctx: Any, grad_residual: Tensor) -> Any:
    needs = list(ctx.needs_input_grad[:2])
    grads = torch.ops.grcsf.residual_map_backward(
        grad_residual, *ctx.saved_tensors, *ctx.options, needs
    )
    return (*registration.empty_to_none(grads, needs), None)


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    image, prediction, *hidden = args
    floating = image.is_floating_point() and prediction.is_floating_point()
    if floating and torch.finfo(prediction.dtype).eps < torch.finfo(image.dtype).eps:
        image = image.to(prediction.dtype)
    return (image, prediction, *hidden)


registration.define(
    "residual_map",
    "(Tensor image, Tensor prediction, Tensor? hidden=None, *, int[1] patch_size, "
    'bool normalized_target=False, str average="residuals", float eps=1e-6) -> Tensor',
    _forward,
    _forward_fake,
)
registration.define(
    "residual_map_backward",
    "(Tensor grad_residual, Tensor image, Tensor prediction, Tensor? hidden, int[] patch_size, "
    "bool normalized_target, str average, float eps, bool[] needs) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
registration.register_autograd("residual_map", _autograd, _setup_context)
registration.register_autocast("residual_map", _autocast)

# SPDX-License-Identifier: Apache-2.0
"""``residual_map`` as two Triton kernels, one pass over all draws each.

Tiling. Samples and patches count on as one row of tokens. A program takes BLOCK values (see the
table): several whole tokens where patches are small, one token, or a piece of one. Its tile is
[TOKENS, VALUES], and the draws have an axis of their own before it, [DRAWS, TOKENS, VALUES]. The
loads of the next DRAWS draws are under way while the last ones are summed, and the first while the
statistics of the patch are taken. The number of draws is a loop at run time.

Coalescing. A token is contiguous in the prediction, voxel slow and channel fast, and so is VALUES.
In the volume a patch is rows of PATCH_W voxels:

- layout ``rows``: one channel, or channels-last. A row of a patch is a run of memory in the order
  of tokens. Where rows are shorter than a sector (patches of 2 or 4 voxels) other lanes of the warp
  hold the next token, whose row follows in memory.
- ``planes``: a power of two of channels, each a volume of its own. The tile is read and written as
  [TOKENS, VALUES / C, C], for which Triton lays the voxels along the lanes, and reshaped to the
  order of tokens through shared memory.
- ``tokens``: other numbers of channels (3, say), each a volume of its own, in the order of tokens:
  lanes stride over the channels, and L1 joins what the voxels of a row have in common.

Statistics of a normalized target are those of one patch, so one program sees all of it: in its
registers where the patch fits into the tile, else in a loop over pieces that joins their moments,
and once more for the result (from L1 or L2). Values are taken about the patch's first one and the
squares about the mean, so that a patch that is constant, or nearly so, far from 0 does not cancel.
Without ``normalized_target`` pieces are programs of their own.

A draw that does not count is masked out of the load: its bytes do not move, nor its NaN.

Offsets are 32 bits wide unless a tensor has more than 2^31 - 1 elements (WIDE), then all are 64.
No program writes what another one reads or writes, so there is nothing to order between programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton.launch import blocks, launch, parameters, power_of_2, wide
from grcsf_kernels.triton.primitives import compute
from grcsf_kernels.triton.residual_map.tiles import (
    counted_of,
    draws_from,
    fold,
    load_patch,
    narrow,
    place_of,
    read_draws,
    share_of,
    sign_of,
    statistics,
    store_patch,
    token_place,
    weight_of,
)

# More channels than this are read in the order of tokens: a tile would hold few voxels of a row.
_MOST_PLANES = 32
# Values of the patches that the table's shape class "patch" is for: the half of this to this.
_PATCH = 4096


@triton.jit
def grcsf_residual_map_forward(
    image,
    prediction,
    hidden,
    residual,
    tokens,
    per_sample,
    grid_h,
    grid_w,
    draws,
    stride_b,
    stride_c,
    stride_d,
    stride_h,
    PATCH_D: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RECONSTRUCTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    DRAWS: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Residual [B, C, *S] of an image [B, C, *S] and predictions [N, B, L, M = P * C].

    One program a group of TOKENS tokens (with NORMALIZED) or a piece of VALUES of their values.
    Bytes: image, residual and the draws that count, once each (with NORMALIZED the image once more
    where a patch does not fit into the tile), and ``hidden``.
    """
    M: tl.constexpr = PATCH_D * PATCH_H * PATCH_W * C
    strides = (stride_b, stride_c, stride_d, stride_h)
    token, exists, corner, begin, end = share_of(
        tl.program_id(0), tokens, per_sample, grid_h, grid_w, strides,
        PATCH_D, PATCH_H, PATCH_W, C, LAYOUT, NORMALIZED, WIDE, TOKENS, VALUES,
    )  # fmt: skip
    # Ahead by one step: under way while the statistics are taken, and while a step is summed.
    ahead = read_draws(
        prediction, hidden, 0, draws, token, exists, tokens, begin, end, M, WIDE, DRAWS, VALUES
    )
    if NORMALIZED:
        mean, scale = statistics(
            image, corner, exists, strides, EPS,
            PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, PRECISION, TOKENS, VALUES,
        )  # fmt: skip
    for first in range(begin, end, VALUES):
        place, mask = place_of(
            first, corner, exists, strides,
            PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, VALUES,
        )  # fmt: skip
        x = load_patch(image, place, mask, PRECISION, TOKENS, VALUES)
        total = tl.zeros_like(x)
        count = tl.zeros((TOKENS,), tl.int32)
        for first_draw in range(0, draws, DRAWS):
            draw = draws_from(first_draw, WIDE, DRAWS)
            counted = counted_of(hidden, draw, draws, token, exists, tokens)
            count += tl.sum(counted.to(tl.int32), axis=0)
            shown = compute(ahead, PRECISION)
            last = first_draw + DRAWS >= draws
            ahead = read_draws(
                prediction, hidden, tl.where(last, 0, first_draw + DRAWS), draws, token, exists,
                tokens, tl.where(last, first + VALUES, first), end, M, WIDE, DRAWS, VALUES,
            )  # fmt: skip
            if RECONSTRUCTIONS:
                total += tl.sum(shown, axis=0)
            else:
                if NORMALIZED:
                    shown = shown * scale[None, :, None] + mean[None, :, None]
                apart = tl.abs(x[None, :, :] - shown)
                total += tl.sum(tl.where(counted[:, :, None], apart, 0), axis=0)
        total *= weight_of(count, PRECISION)[:, None]
        if RECONSTRUCTIONS:
            if NORMALIZED:
                total = total * scale[:, None] + mean[:, None]
            total = tl.where((count > 0)[:, None], tl.abs(x - total), 0)
        store_patch(residual, place, mask, total)


@triton.jit
def grcsf_residual_map_backward(
    grad_residual,
    image,
    prediction,
    hidden,
    grad_image,
    grad_prediction,
    tokens,
    per_sample,
    grid_h,
    grid_w,
    draws,
    stride_b,
    stride_c,
    stride_d,
    stride_h,
    PATCH_D: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RECONSTRUCTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    DRAWS: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Gradients [B, C, *S] of the image and [N, B, L, M] of the predictions; None: not wanted.

    Tiling as in the forward. The sign of a difference is all that passes through the absolute
    value, so sums over draws of signs, and of signs times predictions, are all that has to be kept
    until a patch's draws are read.

    Bytes: image, its two gradients, the draws that count and the gradient of every draw, once each.
    Where NORMALIZED and a patch does not fit into the tile, its image twice more and grad_image, of
    which the part that needs no sums is written first, once more in and out.

    Hazard: in that last case a thread reads values of grad_image that another thread of the same
    program wrote; a barrier stands between.
    """
    M: tl.constexpr = PATCH_D * PATCH_H * PATCH_W * C
    strides = (stride_b, stride_c, stride_d, stride_h)
    token, exists, corner, begin, end = share_of(
        tl.program_id(0), tokens, per_sample, grid_h, grid_w, strides,
        PATCH_D, PATCH_H, PATCH_W, C, LAYOUT, NORMALIZED, WIDE, TOKENS, VALUES,
    )  # fmt: skip
    # Ahead by one step: under way while the statistics are taken, and while a step is summed.
    ahead = read_draws(
        prediction, hidden, 0, draws, token, exists, tokens, begin, end, M, WIDE, DRAWS, VALUES
    )
    if NORMALIZED:
        mean, scale = statistics(
            image, corner, exists, strides, EPS,
            PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, PRECISION, TOKENS, VALUES,
        )  # fmt: skip
        grad_mean = tl.zeros_like(mean)
        grad_scale = tl.zeros_like(mean)
    count = tl.zeros((TOKENS,), tl.int32)
    if hidden is None:
        count += draws
    else:
        for first_draw in range(0, draws, DRAWS):
            draw = draws_from(first_draw, WIDE, DRAWS)
            counted = counted_of(hidden, draw, draws, token, exists, tokens)
            count += tl.sum(counted.to(tl.int32), axis=0)
    weight = weight_of(count, PRECISION)

    for first in range(begin, end, VALUES):
        place, mask = place_of(
            first, corner, exists, strides,
            PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, VALUES,
        )  # fmt: skip
        x = load_patch(image, place, mask, PRECISION, TOKENS, VALUES)
        grad = load_patch(grad_residual, place, mask, PRECISION, TOKENS, VALUES) * weight[:, None]
        valid = (first + tl.arange(0, VALUES) < M)[None, None, :]
        signs = tl.zeros_like(x)
        sums = tl.zeros_like(x)
        if not RECONSTRUCTIONS:
            sums = fold(sums, TOKENS, VALUES)
        for first_draw in range(0, draws, DRAWS):
            draw = draws_from(first_draw, WIDE, DRAWS)
            counted = counted_of(hidden, draw, draws, token, exists, tokens)
            shown = compute(ahead, PRECISION)
            last = first_draw + DRAWS >= draws
            ahead = read_draws(
                prediction, hidden, tl.where(last, 0, first_draw + DRAWS), draws, token, exists,
                tokens, tl.where(last, first + VALUES, first), end, M, WIDE, DRAWS, VALUES,
            )  # fmt: skip
            if RECONSTRUCTIONS:
                sums += tl.sum(shown, axis=0)
            else:
                if NORMALIZED:
                    apart = x[None, :, :] - (shown * scale[None, :, None] + mean[None, :, None])
                else:
                    apart = x[None, :, :] - shown
                sign = tl.where(counted[:, :, None], sign_of(apart), 0)
                signs += tl.sum(sign, axis=0)
                if NORMALIZED:
                    sums += fold(tl.sum(grad[None, :, :] * sign * shown, axis=0), TOKENS, VALUES)
                    sign *= scale[None, :, None]
                if grad_prediction is not None:
                    # The scale goes with the sign: the product with grad would stay in registers.
                    value = tl.where(counted[:, :, None], grad[None, :, :] * -sign, 0)
                    tl.store(
                        grad_prediction + token_place(draw, token, tokens, first, M, VALUES),
                        narrow(value, grad_prediction),
                        mask=((draw < draws)[:, None] & exists[None, :])[:, :, None] & valid,
                    )
        if RECONSTRUCTIONS:
            average = sums * weight[:, None]
            if NORMALIZED:
                average = average * scale[:, None] + mean[:, None]
            signs = sign_of(x - average)
            own_grad = grad * signs
            sums = fold(sums * own_grad, TOKENS, VALUES)
            if grad_prediction is not None:
                value = -own_grad * scale[:, None] if NORMALIZED else -own_grad
                for first_draw in range(0, draws, DRAWS):
                    draw = draws_from(first_draw, WIDE, DRAWS)
                    counted = counted_of(hidden, draw, draws, token, exists, tokens)
                    tl.store(
                        grad_prediction + token_place(draw, token, tokens, first, M, VALUES),
                        narrow(tl.where(counted[:, :, None], value[None], 0), grad_prediction),
                        mask=((draw < draws)[:, None] & exists[None, :])[:, :, None] & valid,
                    )
            own_grad *= count[:, None]
        else:
            own_grad = grad * signs
        if grad_image is not None:
            # Where no draw counts, whatever x and grad are, the gradient is 0.
            counts = (count > 0)[:, None] & (first + tl.arange(0, VALUES) < M)[None, :]
            own_grad = tl.where(counts, own_grad, 0)
            if NORMALIZED:
                grad_mean -= tl.sum(own_grad, axis=1)
                grad_scale -= tl.where(count > 0, tl.sum(sums, axis=1), 0)
                if VALUES >= M:
                    slope = grad_scale / ((M - 1) * scale)
                    own_grad += (grad_mean / M)[:, None] + slope[:, None] * (x - mean[:, None])
            store_patch(grad_image, place, mask, own_grad)

    if NORMALIZED and VALUES < M and grad_image is not None:
        tl.debug_barrier()
        slope = grad_scale / ((M - 1) * scale)
        for first in range(begin, end, VALUES):
            place, mask = place_of(
                first, corner, exists, strides,
                PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, VALUES,
            )  # fmt: skip
            x = load_patch(image, place, mask, PRECISION, TOKENS, VALUES)
            own_grad = load_patch(grad_image, place, mask, PRECISION, TOKENS, VALUES)
            own_grad += (grad_mean / M)[:, None] + slope[:, None] * (x - mean[:, None])
            store_patch(grad_image, place, mask, own_grad)


def _geometry(
    kernel: str, image: Tensor, prediction: Tensor, patch_size: Sequence[int], normalized: bool
) -> tuple[int, list[Any], dict[str, Any]]:
    """Programs, the run-time arguments that say what lies where, and the constants of a launch."""
    draws, batch, per_sample, values = prediction.shape
    channels = image.shape[1]
    patch = [1] * (3 - len(patch_size)) + list(patch_size)
    grid = [size // own for size, own in zip(image.shape[-2:], patch[-2:], strict=True)]
    strides = image.stride()
    stride_d = strides[2] if image.ndim == 5 else 0
    rows = channels == 1 or strides[1] == 1
    # The usual autoencoder's patch, 16 voxels a side, has registers to spare for more warps.
    shape = "patch" if rows and _PATCH // 2 < values <= _PATCH else "any"
    constants: dict[str, Any] = parameters(
        "residual_map", kernel, image, shape if normalized else "plain"
    )
    block = constants.pop("BLOCK")
    width = min(block, power_of_2(values))
    if rows:
        layout = "rows"
    elif channels == power_of_2(channels) and channels <= min(width, _MOST_PLANES):
        layout = "planes"
    else:
        layout = "tokens"
    group = block // width
    tokens = batch * per_sample
    constants |= {
        "PATCH_D": patch[0],
        "PATCH_H": patch[1],
        "PATCH_W": patch[2],
        "C": channels,
        "LAYOUT": layout,
        "NORMALIZED": normalized,
        "PRECISION": "float64" if image.dtype == torch.float64 else "float32",
        "WIDE": wide(image, prediction),
        "DRAWS": min(constants["DRAWS"], power_of_2(draws)),
        "TOKENS": group,
        "VALUES": width,
    }
    programs = blocks(tokens, group) * (1 if normalized else blocks(values, width))
    numbers = [tokens, per_sample, *grid, draws, strides[0], strides[1], stride_d, strides[-2]]
    return programs, numbers, constants


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
    programs, numbers, constants = _geometry(
        "forward", image, prediction, patch_size, normalized_target
    )
    residual = torch.empty_like(image)
    launch(
        grcsf_residual_map_forward,
        programs,
        image,
        prediction,
        None if hidden is None else hidden.view(torch.uint8),
        residual,
        *numbers,
        EPS=eps,
        RECONSTRUCTIONS=average == "reconstructions",
        **constants,
    )
    return residual


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
    """Gradients of image and prediction (None where not needed)."""
    grad_image = torch.empty_like(image) if needs[0] else None
    grad_prediction = torch.empty_like(prediction) if needs[1] else None
    if not any(needs):
        return None, None
    programs, numbers, constants = _geometry(
        "backward", image, prediction, patch_size, normalized_target
    )
    launch(
        grcsf_residual_map_backward,
        programs,
        grad_residual,
        image,
        prediction,
        None if hidden is None else hidden.view(torch.uint8),
        grad_image,
        grad_prediction,
        *numbers,
        EPS=eps,
        RECONSTRUCTIONS=average == "reconstructions",
        **constants,
    )
    return grad_image, grad_prediction

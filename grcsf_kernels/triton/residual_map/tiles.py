# SPDX-License-Identifier: Apache-2.0
"""The tiles of ``residual_map``: where the values of tokens lie in volume and prediction.

``residual_map.py`` says what a tile is and why it is read as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.primitives import compute


@triton.jit
def _corner(
    token,
    per_sample,
    grid_h,
    grid_w,
    strides,
    PATCH_D: tl.constexpr,
    PATCH_H: tl.constexpr,
    STEP_W: tl.constexpr,
):
    """Offset [TOKENS] in the volume of the first voxel of each token's patch."""
    stride_b, _, stride_d, stride_h = strides
    sample = token // per_sample
    place = token % per_sample
    w = place % grid_w
    h = place // grid_w % grid_h
    d = place // grid_w // grid_h
    return sample * stride_b + d * PATCH_D * stride_d + h * PATCH_H * stride_h + w * STEP_W


@triton.jit
def share_of(
    program,
    tokens,
    per_sample,
    grid_h,
    grid_w,
    strides,
    PATCH_D: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """What a program works on.

    Returns:
        numbers of its tokens, counted through all samples, whether they exist, the offsets in the
        volume of their patches' first voxels (all [TOKENS]), and the range of values of each.
    """
    M: tl.constexpr = PATCH_D * PATCH_H * PATCH_W * C
    begin = 0
    end = M
    if not NORMALIZED:
        begin = program % tl.cdiv(M, VALUES) * VALUES
        end = tl.minimum(begin + VALUES, M)
        program = program // tl.cdiv(M, VALUES)
    if WIDE:
        program = program.to(tl.int64)
    token = program * TOKENS + tl.arange(0, TOKENS)
    STEP_W: tl.constexpr = PATCH_W * C if LAYOUT == "rows" else PATCH_W
    corner = _corner(token, per_sample, grid_h, grid_w, strides, PATCH_D, PATCH_H, STEP_W)
    return token, token < tokens, corner, begin, end


@triton.jit
def place_of(
    first,
    corner,
    exists,
    strides,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Where in the volume values of each token are, from ``first`` on, and which there are.

    Offsets and mask are [TOKENS, VALUES], or [TOKENS, VALUES / C, C] for layout ``planes``.
    """
    _, stride_c, stride_d, stride_h = strides
    if LAYOUT == "planes":
        voxel = first // C + tl.arange(0, VALUES // C)
    elif LAYOUT == "tokens":
        voxel = (first + tl.arange(0, VALUES)) // C
    else:
        # Here a "voxel" is a value, of which rows have PATCH_W * C.
        voxel = first + tl.arange(0, VALUES)
    LENGTH: tl.constexpr = PATCH_W * C if LAYOUT == "rows" else PATCH_W
    row = voxel // LENGTH
    plane = row // PATCH_H
    row = row % PATCH_H
    if WIDE:
        row = row.to(tl.int64)
        plane = plane.to(tl.int64)
    inside = plane * stride_d + row * stride_h + voxel % LENGTH
    if LAYOUT == "planes":
        channel = tl.arange(0, C)
        if WIDE:
            channel = channel.to(tl.int64)
        offset = (corner[:, None] + inside[None, :])[:, :, None] + (channel * stride_c)[None, None]
        return offset, exists[:, None, None] & (voxel < M // C)[None, :, None]
    elif LAYOUT == "tokens":
        value = first + tl.arange(0, VALUES)
        channel = value % C
        if WIDE:
            channel = channel.to(tl.int64)
        inside += channel * stride_c
        return corner[:, None] + inside[None, :], exists[:, None] & (value < M)[None, :]
    else:
        return corner[:, None] + inside[None, :], exists[:, None] & (voxel < M)[None, :]


@triton.jit
def load_patch(
    volume, place, mask, PRECISION: tl.constexpr, TOKENS: tl.constexpr, VALUES: tl.constexpr
):
    """Values [TOKENS, VALUES] in the order of tokens; 0 outside."""
    loaded = tl.load(volume + place, mask=mask, other=0)
    return compute(tl.reshape(loaded, (TOKENS, VALUES)), PRECISION)


@triton.jit
def narrow(value, like):
    """``value`` in the dtype that ``like`` points to."""
    if like.dtype.element_ty == tl.bfloat16:
        # The interpreter does not round float64 to bfloat16 in one step.
        value = value.to(tl.float32)
    return value.to(like.dtype.element_ty)


@triton.jit
def store_patch(volume, place, mask, value):
    """The inverse of :func:`load_patch`."""
    tl.store(volume + place, narrow(tl.reshape(value, place.shape), volume), mask=mask)


@triton.jit
def draws_from(first, WIDE: tl.constexpr, DRAWS: tl.constexpr):
    """Numbers of DRAWS draws."""
    draw = first + tl.arange(0, DRAWS)
    return draw.to(tl.int64) if WIDE else draw


@triton.jit
def counted_of(hidden, draw, draws, token, exists, tokens):
    """Which draws count for which token, [DRAWS, TOKENS]."""
    counted = (draw < draws)[:, None] & exists[None, :]
    if hidden is not None:
        shown = tl.load(hidden + (draw[:, None] * tokens + token[None, :]), mask=counted, other=0)
        counted = counted & (shown != 0)
    return counted


@triton.jit
def weight_of(count, PRECISION: tl.constexpr):
    """1 / (number of draws that count), [TOKENS]; 0 where none does."""
    return tl.where(count > 0, 1 / compute(tl.maximum(count, 1), PRECISION), 0)


@triton.jit
def token_place(draw, token, tokens, first, M: tl.constexpr, VALUES: tl.constexpr):
    """Offsets of values in the prediction, [DRAWS, TOKENS, VALUES]."""
    value = first + tl.arange(0, VALUES)
    return ((draw[:, None] * tokens + token[None, :]) * M)[:, :, None] + value[None, None, :]


@triton.jit
def read_draws(
    prediction,
    hidden,
    first_draw,
    draws,
    token,
    exists,
    tokens,
    first,
    end,
    M: tl.constexpr,
    WIDE: tl.constexpr,
    DRAWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Values of some draws as they are, [DRAWS, TOKENS, VALUES]; 0 where one does not count."""
    draw = draws_from(first_draw, WIDE, DRAWS)
    mask = counted_of(hidden, draw, draws, token, exists, tokens)[:, :, None]
    mask &= (first + tl.arange(0, VALUES) < end)[None, None, :]
    # Each value is read once: it need not push the image out of the cache.
    return tl.load(
        prediction + token_place(draw, token, tokens, first, M, VALUES),
        mask=mask,
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit
def _moments(x, origin, valid, count):
    """Mean of x - origin and the squares about it, over the ``valid`` of [TOKENS, VALUES]."""
    difference = tl.where(valid, x - origin[:, None], 0)
    mean = tl.sum(difference, axis=1) / count
    difference = tl.where(valid, difference - mean[:, None], 0)
    return mean, tl.sum(difference * difference, axis=1)


@triton.jit
def statistics(
    image,
    corner,
    exists,
    strides,
    EPS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Offset (mean) and scale (sqrt of variance + EPS) of each token's patch, [TOKENS].

    Where a patch has more values than the tile, the moments of its pieces are joined by the formula
    of Chan, Golub and LeVeque.
    """
    origin = compute(tl.load(image + corner, mask=exists, other=0), PRECISION)
    mean = tl.zeros_like(origin)
    squares = tl.zeros_like(origin)
    for first in range(0, M, VALUES):
        place, mask = place_of(
            first, corner, exists, strides,
            PATCH_H, PATCH_W, M, C, LAYOUT, WIDE, VALUES,
        )  # fmt: skip
        x = load_patch(image, place, mask, PRECISION, TOKENS, VALUES)
        valid = (first + tl.arange(0, VALUES) < M)[None, :]
        count = compute(tl.minimum(M - first, VALUES), PRECISION)
        own_mean, own_squares = _moments(x, origin, valid, count)
        before = compute(tl.zeros((TOKENS,), tl.int32) + first, PRECISION)
        share = count / (before + count)
        step = own_mean - mean
        mean += step * share
        squares += own_squares + step * step * (before * share)
    return origin + mean, tl.sqrt(squares / (M - 1) + EPS)


@triton.jit
def fold(value, TOKENS: tl.constexpr, VALUES: tl.constexpr):
    """[TOKENS, VALUES] to [TOKENS, VALUES / 8]: sums of neighbors, which one thread has anyway."""
    if VALUES < 8:
        return value
    else:
        return tl.sum(tl.reshape(value, (TOKENS, VALUES // 8, 8)), axis=2)


@triton.jit
def sign_of(difference):
    """1, -1 or 0; NaN stays NaN."""
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))

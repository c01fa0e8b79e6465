# SPDX-License-Identifier: Apache-2.0
"""Attention to one map channel as a table, in Triton: what the kernels of ``rcu`` share.

*Columns.* The heads of all maps lie side by side in N columns, N = K * heads rounded up to a power
of two. A product on tensor cores has at least 16, so each column is spread over PARTS = 16 / N of
them: the first takes a weight rounded to TF32, the second what was rounded off, and their sum costs
nothing, since both lie in one thread.

*Table.* For one map channel, attention is one function E(a) of the query for each patch and map
(docs/operators.md). It is tabulated at evenly spaced nodes over the range of a that occurs; its
slope is the variance, so a cubic Hermite spline of the two is off by less than the data's rounding
where step * (range of r) stays below ``STEP``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.primitives import dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(v, box, PZ, PY, PX, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """Coordinates in the volume of voxel ``v`` of a patch, and whether it exists.

    ``box`` is the patch's first voxel and the size of the volume: (z0, y0, x0, D, H, W).
    """
    z0, y0, x0, D, H, W = box
    z, y, x = z0 + v // (PY * PX), y0 + v // PX % PY, x0 + v % PX
    if EVEN:
        valid = tl.full(v.shape, True, tl.int1)
    else:
        valid = (v < PZ * PY * PX) & (z < D) & (y < H) & (x < W)
    if WIDE:
        z, y, x = z.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    return z, y, x, valid


@triton.jit
def parts(weight, part, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """What each part of a column takes of ``weight``: what TF32 keeps, what it rounds off, 0."""
    if PARTS == 1:
        return weight
    elif PRECISION == "tf32":
        high = (weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return tl.where(part == 0, high, tl.where(part == 1, weight - high, 0.0))
    else:
        return tl.where(part == 0, weight, 0.0)


@triton.jit
def weight_row(column, stride_k, stride_h, HEADS: tl.constexpr):
    """Where the weights of each column begin: they are stored by map and head."""
    return column // HEADS * stride_k + column % HEADS * stride_h


@triton.jit
def columns_of(
    x,
    weight,
    c,
    stride_k,
    stride_h,
    stride_c,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    KH: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [voxels, channels] times a weight [K, heads, C] of any strides: [voxels, N]."""
    n = tl.arange(0, N * PARTS)
    column = n // PARTS
    own = tl.load(
        weight + weight_row(column, stride_k, stride_h, HEADS)[None, :] + c[:, None] * stride_c,
        mask=(c[:, None] < C) & (column[None, :] < KH),
        other=0.0,
    )
    found = dot(x, parts(own, (n % PARTS)[None, :], PARTS, PRECISION), PRECISION)
    if PARTS > 1:
        found = tl.sum(tl.reshape(found, (x.shape[0], N, PARTS)), axis=2)
    return found


@triton.jit
def channels_of(
    values,
    weight,
    c,
    stride_k,
    stride_h,
    stride_c,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    KH: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """values [voxels, N] times a weight [K, heads, C] of any strides: [voxels, channels]."""
    n = tl.arange(0, N * PARTS)
    column = n // PARTS
    own = tl.load(
        weight + weight_row(column, stride_k, stride_h, HEADS)[:, None] + c[None, :] * stride_c,
        mask=(c[None, :] < C) & (column[:, None] < KH),
        other=0.0,
    )
    if PARTS > 1:
        wide = tl.broadcast_to(values[:, :, None], (values.shape[0], N, PARTS))
        values = tl.reshape(wide, (values.shape[0], N * PARTS))
    return dot(values, parts(own, (n % PARTS)[:, None], PARTS, PRECISION), PRECISION)


@triton.jit
def moments(r, valid, node, step, low, high, center, THIRD: tl.constexpr):
    """What voxels add to the sums of w, w u, w u^2 (and w u^3) at ``node`` [ROWS] and one step on.

    w = exp(a r) up to a factor for each node, which cancels; u = r - center. Exponents are taken
    from the end of the range of r where they are largest, so that none overflows. One exponential
    gives two nodes: the units for exponentials are what limits. [ROWS, voxels] each, not yet summed
    over voxels: with 32 voxels the rows lie in different warps, and a sum is one for each row
    instead of one for each row and tile.
    """
    end = tl.where(node >= 0, high, low)
    w = tl.exp2((node * LOG2E)[:, None] * (r[None, :] - end[:, None]))
    w = tl.where(valid[None, :], w, 0.0)
    factor = tl.exp2((r - 0.5 * (low + high)) * (step * LOG2E))
    # A voxel that does not exist has weight 0, and must not bring an infinite factor.
    next_w = w * tl.where(valid, factor, 0.0)[None, :]
    u = tl.where(valid, r - center, 0.0)[None, :]
    w1, next1 = w * u, next_w * u
    w2, next2 = w1 * u, next1 * u
    if THIRD:
        return w, w1, w2, w2 * u, next_w, next1, next2, next2 * u
    else:
        return w, w1, w2, w2, next_w, next1, next2, next2


@triton.jit
def interleaved(even, odd):
    """Sums over voxels of [ROWS, voxels] twice, as one vector [2 ROWS] of nodes in their order."""
    nodes: tl.constexpr = 2 * even.shape[0]
    return tl.reshape(tl.join(tl.sum(even, axis=1), tl.sum(odd, axis=1)), (nodes,))


@triton.jit
def cumulants(s0, s1, s2, s3, center):
    """Mean, variance and third cumulant of r from sums of powers about ``center``."""
    mean, square, cube = s1 / s0, s2 / s0, s3 / s0
    variance = tl.maximum(square - mean * mean, 0.0)
    third = cube - 3 * mean * square + 2 * mean * mean * mean
    return center + mean, variance, third


@triton.jit
def hermite(left, right, left_slope, right_slope, f):
    """The cubic through two nodes with their slopes (times the step), at fraction ``f``."""
    rise = right - left
    inner = 3 * rise - 2 * left_slope - right_slope
    return left + f * (left_slope + f * (inner + f * (left_slope + right_slope - 2 * rise)))


@triton.jit
def interval(a, low, per_step, nodes):
    """The node left of each query, and the fraction of the step beyond it."""
    position = (a - low[None, :]) * per_step[None, :]
    left = tl.minimum(tl.maximum(position, 0.0), nodes - 2.0).to(tl.int32)
    return left, position - left.to(tl.float32)


@triton.jit
def direct(
    a,
    residual,
    box,
    PZ,
    PY,
    PX,
    low,
    high,
    HEADS: tl.constexpr,
    KH: tl.constexpr,
    N: tl.constexpr,
    KEYS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """E, and with ``SECOND`` the variance about it, as direct sums over the voxels of the patch.

    ``a`` [voxels, N]; ``residual`` points to the maps of the sample; ``low`` and ``high`` [N] are
    the range of r. The largest logit is a * high or a * low, so no running maximum is needed. Sums
    are taken over groups of 16 blocks, so that many small weights keep their digits.
    """
    _z0, _y0, _x0, D, H, W = box
    n = tl.arange(0, N)
    largest = tl.maximum(a * low[None, :], a * high[None, :])
    plane = (n // HEADS).to(tl.int64) * D * H * W
    voxels = PZ * PY * PX
    center = tl.zeros_like(a)
    variance = tl.zeros_like(a)
    for second in tl.static_range(2 if SECOND else 1):
        s0, s1 = tl.zeros_like(a), tl.zeros_like(a)
        for group in range(0, voxels, 16 * KEYS):
            own0, own1 = tl.zeros_like(a), tl.zeros_like(a)
            for first in range(group, tl.minimum(group + 16 * KEYS, voxels), KEYS):
                j = first + tl.arange(0, KEYS)
                z, y, x, valid = place(j, box, PZ, PY, PX, False, True)
                mask = valid[None, :] & (n < KH)[:, None]
                r = tl.load(
                    residual + plane[:, None] + ((z * H + y) * W + x)[None, :],
                    mask=mask,
                    other=0.0,
                )
                r = r.to(a.dtype)[None, :, :]
                w = tl.exp(a[:, :, None] * r - largest[:, :, None])
                w = tl.where(mask[None, :, :], w, 0.0)
                u = r - center[:, :, None]
                own0 += tl.sum(w, axis=2)
                own1 += tl.sum(w * u * u if second else w * u, axis=2)
            s0 += own0
            s1 += own1
        # Columns that no head owns have no weight at all.
        s0 = tl.where((n < KH)[None, :], s0, 1.0)
        if second:
            variance = s1 / s0
        else:
            center = s1 / s0
    return center, variance

# SPDX-License-Identifier: Apache-2.0
"""What one program of ``rcu`` does with voxels of a patch: one map channel.

Each pass goes through a run of voxels of one patch, BLOCK_V at a time and BLOCK_C channels at a
time, with the columns of queries of all maps and heads at once. The loop over voxel tiles is
pipelined: the tiles to come are on their way to shared memory while one is worked on. The passes
over one patch read the same voxels, from cache after the first (8^3 voxels of 32 channels in half
precision are 32 KiB).

In all of them ``X``, ``GO``, ``GX`` and ``OUT`` point to the sample, ``R`` to its maps, ``box`` is
the patch's first voxel and the size of the volume (z0, y0, x0, D, H, W), and ``strides`` those of x
(c, z, y, x) and of a map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.primitives import add_to, compute, dot
from grcsf_kernels.triton.rcu.table import (
    channels_of,
    columns_of,
    direct,
    hermite,
    interval,
    parts,
    place,
)


@triton.jit
def corner(patch, GZ, GY, GX, PZ, PY, PX):
    """Sample (64 bits) and first voxel of a patch; patches along x are neighbors."""
    gx = patch % GX
    gy = patch // GX % GY
    gz = patch // GX // GY % GZ
    z0, y0, x0 = (gz * PZ).to(tl.int32), (gy * PY).to(tl.int32), (gx * PX).to(tl.int32)
    return patch // GX // GY // GZ, z0, y0, x0


@triton.jit
def voxel_share(box, PZ, PY, PX, like):
    """One over the number of voxels of the patch that exist, in the dtype of ``like``."""
    z0, y0, x0, D, H, W = box
    depth, height, width = tl.minimum(PZ, D - z0), tl.minimum(PY, H - y0), tl.minimum(PX, W - x0)
    return 1 / (depth.to(like.dtype) * height.to(like.dtype) * width.to(like.dtype))


@triton.jit
def project(
    data, weight, in_x, valid, sxc, stride_k, stride_h, stride_c,
    C: tl.constexpr, HEADS: tl.constexpr, KH: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Voxels at ``in_x`` [voxels, C] times a weight [K, heads, C] of any strides: [voxels, N]."""
    dtype: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    found = tl.zeros((in_x.shape[0], N), dtype)
    for c0 in tl.static_range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < C)[None, :]
        wide_c = c.to(tl.int64) if WIDE else c
        own = tl.load(data + in_x[:, None] + wide_c[None, :] * sxc, mask=mask, other=0.0)
        found += columns_of(
            compute(own, PRECISION), weight, c, stride_k, stride_h, stride_c,
            C, HEADS, KH, N, PARTS, PRECISION,
        )  # fmt: skip
    return found


@triton.jit
def survey(
    X, R, QW, QB, W1, MEANS, box, strides, PZ, PY, PX, first, last,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_MEANS: tl.constexpr,
):  # fmt: skip
    """The score's hidden units [M2] without their bias, ranges of a [N] and r [K2], means of r.

    All of the voxels first..last, with the weight that these have in their patch. With
    ``KEEP_MEANS`` they are added to ``MEANS`` [C + K], a slot of this program.
    """
    KH: tl.constexpr = K * HEADS
    sxc, sxz, sxy, sxx, srk = strides
    _z0, _y0, _x0, _depth, H, W = box
    n, k, m = tl.arange(0, N), tl.arange(0, K2), tl.arange(0, M2)
    bias = compute(tl.load(QB + n, mask=n < KH, other=0.0), PRECISION)
    infinity = float("inf")
    a_low = tl.full((BLOCK_V, N), infinity, bias.dtype)
    a_high = tl.full((BLOCK_V, N), -infinity, bias.dtype)
    r_low = tl.full((BLOCK_V, K2), infinity, bias.dtype)
    r_high = tl.full((BLOCK_V, K2), -infinity, bias.dtype)
    r_sum = tl.zeros((BLOCK_V, K2), bias.dtype)
    hidden = tl.zeros((M2,), bias.dtype)
    share = voxel_share(box, PZ, PY, PX, bias)
    for v0 in range(first, last, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        z, y, x, valid = place(v, box, PZ, PY, PX, EVEN, WIDE)
        in_x = z * sxz + y * sxy + x * sxx
        a = tl.zeros((BLOCK_V, N), bias.dtype)
        for c0 in tl.static_range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = valid[:, None] & (c < C)[None, :]
            wide_c = c.to(tl.int64) if WIDE else c
            own = tl.load(X + in_x[:, None] + wide_c[None, :] * sxc, mask=mask, other=0.0)
            own = compute(own, PRECISION)
            a += columns_of(own, QW, c, HEADS * C, C, 1, C, HEADS, KH, N, PARTS, PRECISION)
            mean = tl.sum(own, axis=0) * share
            if KEEP_MEANS:
                add_to(MEANS + c, mean, c < C)
            weight = tl.load(
                W1 + m[:, None] * (C + K) + c[None, :],
                mask=(m < M)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            hidden += tl.sum(weight * mean[None, :], axis=1)
        a += bias[None, :]
        exists = valid[:, None] & (n < KH)[None, :]
        a_low = tl.minimum(a_low, tl.where(exists, a, infinity))
        a_high = tl.maximum(a_high, tl.where(exists, a, -infinity))

        exists = valid[:, None] & (k < K)[None, :]
        wide_k = k.to(tl.int64) if WIDE else k
        in_r = ((z * H + y) * W + x)[:, None] + wide_k[None, :] * srk
        r = compute(tl.load(R + in_r, mask=exists, other=0.0), PRECISION)
        r_low = tl.minimum(r_low, tl.where(exists, r, infinity))
        r_high = tl.maximum(r_high, tl.where(exists, r, -infinity))
        r_sum += r
    mean = tl.sum(r_sum, axis=0) * share
    if KEEP_MEANS:
        add_to(MEANS + C + k, mean, k < K)
    weight = tl.load(
        W1 + m[:, None] * (C + K) + C + k[None, :],
        mask=(m < M)[:, None] & (k < K)[None, :],
        other=0.0,
    )
    hidden += tl.sum(weight * mean[None, :], axis=1)
    return (
        hidden,
        tl.min(a_low, axis=0),
        tl.max(a_high, axis=0),
        tl.min(r_low, axis=0),
        tl.max(r_high, axis=0),
        mean,
    )


@triton.jit
def spline(
    a, left, slope, node, step, nodes,
    HEADS: tl.constexpr, KH: tl.constexpr, N: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """A table and its slopes at queries [voxels, N].

    ``left`` and ``slope`` point to the first node's value and slope; tables have ``FIELDS`` values
    a node, one table for each map. ``node`` [N] is the first query, ``step`` [N] the distance.
    """
    n = tl.arange(0, N)
    per_step = tl.where(step > 0, 1 / step, 0.0)
    index, f = interval(a, node, per_step, nodes)
    # Columns that no head owns read the last map, and are multiplied by no weight.
    own_map = tl.minimum(n, KH - 1) // HEADS
    at = ((own_map * nodes)[None, :] + index) * FIELDS
    return hermite(
        tl.load(left + at),
        tl.load(left + at + FIELDS),
        tl.load(slope + at) * step[None, :],
        tl.load(slope + at + FIELDS) * step[None, :],
        f,
    )


@triton.jit
def evaluate(
    a, R, box, PZ, PY, PX, low, high, tabulated, left, slope, node, step, nodes,
    HEADS: tl.constexpr, KH: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    VARIANCE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """E, or the variance with ``VARIANCE``: from the table, or a direct sum where there is none."""
    if T == 0:
        mean, variance = direct(a, R, box, PZ, PY, PX, low, high, HEADS, KH, N, KEYS, VARIANCE)
        found = variance if VARIANCE else mean
    elif tabulated:
        found = spline(a, left, slope, node, step, nodes, HEADS, KH, N, FIELDS)
    else:
        mean, variance = direct(a, R, box, PZ, PY, PX, low, high, HEADS, KH, N, KEYS, VARIANCE)
        found = variance if VARIANCE else mean
    return found


@triton.jit
def output_pass(
    X, R, QW, QB, VW, VB, OUT, box, strides, PZ, PY, PX, first, last,
    score, low, high, tabulated, mean, variance, node, step, nodes,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """out = x + score * y for the voxels first..last."""
    KH: tl.constexpr = K * HEADS
    sxc, sxz, sxy, sxx, _srk = strides
    n = tl.arange(0, N)
    bias = compute(tl.load(QB + n, mask=n < KH, other=0.0), PRECISION)
    for v0 in range(first, last, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        z, y, x, valid = place(v, box, PZ, PY, PX, EVEN, WIDE)
        in_x = z * sxz + y * sxy + x * sxx
        a = project(
            X, QW, in_x, valid, sxc, HEADS * C, C, 1,
            C, HEADS, KH, N, PARTS, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
        a += bias[None, :]
        expected = evaluate(
            a, R, box, PZ, PY, PX, low, high, tabulated, mean, variance, node, step, nodes,
            HEADS, KH, N, KEYS, T, False, FIELDS,
        )  # fmt: skip
        for c0 in tl.static_range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = valid[:, None] & (c < C)[None, :]
            wide_c = c.to(tl.int64) if WIDE else c
            offsets = in_x[:, None] + wide_c[None, :] * sxc
            added = channels_of(
                expected, VW, c, C * HEADS, 1, HEADS, C, HEADS, KH, N, PARTS, PRECISION
            )
            constant = tl.zeros((BLOCK_C,), bias.dtype)
            for each in tl.static_range(K):
                constant += tl.load(VB + each * C + c, mask=c < C, other=0.0)
            own = compute(tl.load(X + offsets, mask=mask, other=0.0), PRECISION)
            result = own + score * (added + constant[None, :])
            tl.store(OUT + offsets, result.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def outer(values, tile, N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """The sum over voxels of values [voxels, N] times tile [voxels, channels]: [N, channels]."""
    if PARTS > 1:
        part = tl.arange(0, N * PARTS) % PARTS
        wide = tl.broadcast_to(values[:, :, None], (values.shape[0], N, PARTS))
        wide = tl.reshape(wide, (values.shape[0], N * PARTS))
        found = dot(tl.trans(parts(wide, part[None, :], PARTS, PRECISION)), tile, PRECISION)
        return tl.sum(tl.reshape(found, (N, PARTS, tile.shape[1])), axis=1)
    else:
        return dot(tl.trans(values), tile, PRECISION)


@triton.jit
def value_pass(
    GO, X, R, QW, QB, VW, VB, GRAD_VW, GRAD_VB, box, strides, PZ, PY, PX, first, last,
    score, low, high, tabulated, mean, variance, node, step, nodes,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of value weights [KH, C] and bias [C]; returns that of the score.

    The gradient of the score is the sum of GO . y over the voxels first..last.
    """
    KH: tl.constexpr = K * HEADS
    sxc, sxz, sxy, sxx, _srk = strides
    n = tl.arange(0, N)
    bias = compute(tl.load(QB + n, mask=n < KH, other=0.0), PRECISION)
    reaching = tl.zeros((BLOCK_V, N), bias.dtype)
    through_bias = tl.zeros((BLOCK_C,), bias.dtype)
    for v0 in range(first, last, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        z, y, x, valid = place(v, box, PZ, PY, PX, EVEN, WIDE)
        in_x = z * sxz + y * sxy + x * sxx
        a = project(
            X, QW, in_x, valid, sxc, HEADS * C, C, 1,
            C, HEADS, KH, N, PARTS, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
        ge = project(
            GO, VW, in_x, valid, sxc, C * HEADS, 1, HEADS,
            C, HEADS, KH, N, PARTS, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
        a += bias[None, :]
        expected = evaluate(
            a, R, box, PZ, PY, PX, low, high, tabulated, mean, variance, node, step, nodes,
            HEADS, KH, N, KEYS, T, False, FIELDS,
        )  # fmt: skip
        # Voxels that don't exist have a finite or no expectation, and no gradient.
        expected = tl.where(valid[:, None] & (n < KH)[None, :], expected, 0.0)
        reaching += ge * expected
        for c0 in tl.static_range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = valid[:, None] & (c < C)[None, :]
            wide_c = c.to(tl.int64) if WIDE else c
            offsets = in_x[:, None] + wide_c[None, :] * sxc
            go = compute(tl.load(GO + offsets, mask=mask, other=0.0), PRECISION)
            total = tl.sum(go, axis=0)
            constant = tl.zeros((BLOCK_C,), bias.dtype)
            for each in tl.static_range(K):
                constant += tl.load(VB + each * C + c, mask=c < C, other=0.0)
            through_bias += total * constant
            add_to(GRAD_VB + c, score * total, c < C)
            add_to(
                GRAD_VW + n[:, None] * C + c[None, :],
                score * outer(expected, go, N, PARTS, PRECISION),
                (n < KH)[:, None] & (c < C)[None, :],
            )
    return tl.sum(reaching) + tl.sum(through_bias)


@triton.jit
def query_pass(
    GO, X, R, QW, QB, VW, GX, GRAD_QW, GRAD_QB, box, strides, PZ, PY, PX, first, last,
    score, MEAN_GRADIENT, share, low, high, tabulated, variance, third, node, step, nodes,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """The gradient of x; adds to those of query weights [KH, C] and bias [KH].

    ``MEAN_GRADIENT`` points to the gradient of the patch's mean of x [C].
    """
    KH: tl.constexpr = K * HEADS
    sxc, sxz, sxy, sxx, _srk = strides
    n = tl.arange(0, N)
    bias = compute(tl.load(QB + n, mask=n < KH, other=0.0), PRECISION)
    of_bias = tl.zeros((BLOCK_V, N), bias.dtype)
    for v0 in range(first, last, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        z, y, x, valid = place(v, box, PZ, PY, PX, EVEN, WIDE)
        in_x = z * sxz + y * sxy + x * sxx
        a = project(
            X, QW, in_x, valid, sxc, HEADS * C, C, 1,
            C, HEADS, KH, N, PARTS, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
        ge = project(
            GO, VW, in_x, valid, sxc, C * HEADS, 1, HEADS,
            C, HEADS, KH, N, PARTS, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
        a += bias[None, :]
        slope = evaluate(
            a, R, box, PZ, PY, PX, low, high, tabulated, variance, third, node, step, nodes,
            HEADS, KH, N, KEYS, T, True, FIELDS,
        )  # fmt: skip
        ga = tl.where(valid[:, None] & (n < KH)[None, :], score * ge * slope, 0.0)
        of_bias += ga
        for c0 in tl.static_range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = valid[:, None] & (c < C)[None, :]
            wide_c = c.to(tl.int64) if WIDE else c
            offsets = in_x[:, None] + wide_c[None, :] * sxc
            own = compute(tl.load(X + offsets, mask=mask, other=0.0), PRECISION)
            add_to(
                GRAD_QW + n[:, None] * C + c[None, :],
                outer(ga, own, N, PARTS, PRECISION),
                (n < KH)[:, None] & (c < C)[None, :],
            )
            added = channels_of(ga, QW, c, HEADS * C, C, 1, C, HEADS, KH, N, PARTS, PRECISION)
            through_mean = tl.load(MEAN_GRADIENT + c, mask=c < C, other=0.0) * share
            go = compute(tl.load(GO + offsets, mask=mask, other=0.0), PRECISION)
            result = go + added + through_mean[None, :]
            tl.store(GX + offsets, result.to(GX.dtype.element_ty), mask=mask)
    add_to(GRAD_QB + n, tl.sum(of_bias, axis=0), n < KH)

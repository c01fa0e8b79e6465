# SPDX-License-Identifier: Apache-2.0
"""``rcu`` where one program takes a patch: one map channel, up to a few thousand voxels.

A program surveys a patch, makes the table of attention of each map, and goes through the patch
again with it (forward once, backward twice). From memory x, the maps and the incoming gradient are
read once, results written once; the later passes read from cache. The grid is bounded, and a
program takes one patch after the other: its table lies in a slot of its own, about a thousand bytes
that stay in the first-level cache, and in backward it adds up the gradients of weights in slots of
its own, in the order of its patches. The slots are summed afterwards: no atomics, the same bits
every run.

Why the table is not held in registers: gathering from it by shuffles took 124 registers a thread in
the pass over the voxels instead of 72 (float32: 211 instead of 128), and so half of the warps that
hide the latency of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.rcu.passes import (
    corner,
    output_pass,
    query_pass,
    survey,
    value_pass,
    voxel_share,
)
from grcsf_kernels.triton.rcu.table import cumulants, interleaved, moments, place


@triton.jit
def pick(values, index, k):
    """values[k] of a vector in registers."""
    return tl.sum(tl.where(index == k, values, 0.0))


@triton.jit
def map_range(a_low, a_high, each, HEADS: tl.constexpr, KH: tl.constexpr, N: tl.constexpr):
    """The least and the greatest query of any head of a map."""
    n = tl.arange(0, N)
    of_map = (n // HEADS == each) & (n < KH)
    low = tl.min(tl.where(of_map, a_low, float("inf")))
    return low, tl.max(tl.where(of_map, a_high, -float("inf")))


@triton.jit
def nodes_needed(
    a_low, a_high, r_low, r_high,
    K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """How many steps a table takes: the range of a times that of r, over STEP; the most of a map.

    Not a number, or infinite, where a range is.
    """
    k = tl.arange(0, K2)
    most = 0.0
    for each in tl.static_range(K):
        low, high = map_range(a_low, a_high, each, HEADS, K * HEADS, N)
        needed = (high - low) * (pick(r_high, k, each) - pick(r_low, k, each)) / STEP
        # A NaN stays: it compares false below.
        most = tl.where(needed <= most, most, needed)
    return most


@triton.jit
def tabulate(
    R, TABLE, box, srk, PZ, PY, PX, blocks, a_low, a_high, r_low, r_high, r_mean,
    K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr, EVEN: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Mean, variance (and third cumulant) at ``blocks`` * 2 * ROWS nodes over the range of a.

    ``TABLE`` [K, nodes, FIELDS] gets them. Returns the first node and the step [N]; columns of one
    map have the same.
    """
    NODES: tl.constexpr = 2 * ROWS
    THIRD: tl.constexpr = FIELDS == 3
    _z0, _y0, _x0, _depth, H, W = box
    n, k, row = tl.arange(0, N), tl.arange(0, K2), tl.arange(0, ROWS)
    first = tl.zeros((N,), tl.float32)
    step = tl.zeros((N,), tl.float32)
    for each in range(K):
        of_map = (n // HEADS == each) & (n < K * HEADS)
        low, high = map_range(a_low, a_high, each, HEADS, K * HEADS, N)
        own_step = (high - low) / (blocks * NODES - 1)
        first = tl.where(of_map, low, first)
        step = tl.where(of_map, own_step, step)
        least, greatest = pick(r_low, k, each), pick(r_high, k, each)
        # Clamped, so that a constant map is its own center exactly.
        center = tl.minimum(tl.maximum(pick(r_mean, k, each), least), greatest)
        base = R + tl.cast(each, tl.int64) * srk
        for block in range(blocks):
            node = low + (block * NODES + 2 * row).to(tl.float32) * own_step
            zeros = tl.zeros((ROWS, BLOCK_J), tl.float32)
            s0, s1, s2, s3 = zeros, zeros, zeros, zeros
            next0, next1, next2, next3 = zeros, zeros, zeros, zeros
            for j0 in range(0, PZ * PY * PX, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                z, y, x, valid = place(j, box, PZ, PY, PX, EVEN, False)
                r = tl.load(base + (z * H + y) * W + x, mask=valid, other=0.0).to(tl.float32)
                w0, w1, w2, w3, v0, v1, v2, v3 = moments(
                    r, valid, node, own_step, least, greatest, center, THIRD
                )
                s0, s1, s2 = s0 + w0, s1 + w1, s2 + w2
                next0, next1, next2 = next0 + v0, next1 + v1, next2 + v2
                if THIRD:
                    s3, next3 = s3 + w3, next3 + v3
            mean, variance, third = cumulants(
                interleaved(s0, next0),
                interleaved(s1, next1),
                interleaved(s2, next2),
                interleaved(s3, next3) if THIRD else interleaved(s2, next2),
                center,
            )
            at = TABLE + ((each * blocks + block) * NODES + tl.arange(0, NODES)) * FIELDS
            tl.store(at, mean)
            tl.store(at + 1, variance)
            if THIRD:
                tl.store(at + 2, third)
    return first, step


@triton.jit
def prepare(
    R, TABLE, box, srk, PZ, PY, PX, a_low, a_high, r_low, r_high, r_mean,
    K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_J: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Makes the table if it pays. Returns the range of r by column, first node, step, and nodes.

    0 nodes where the direct sum is to be taken. Hazard: all threads write the table, and read it
    afterwards; the barriers keep the tables of two patches apart too.
    """
    n, k = tl.arange(0, N), tl.arange(0, K2)
    low, high = tl.zeros((N,), r_low.dtype), tl.zeros((N,), r_low.dtype)
    for each in tl.static_range(K):
        low = tl.where(n // HEADS == each, pick(r_low, k, each), low)
        high = tl.where(n // HEADS == each, pick(r_high, k, each), high)
    if T == 0:
        # float64: the direct sum is all there is.
        return low, high, low, low, 0
    else:
        needed = nodes_needed(a_low, a_high, r_low, r_high, K, HEADS, N, K2, STEP)
        tabulated = needed <= T - 2
        blocks = tl.where(tabulated, (needed.to(tl.int32) + 2 + 2 * ROWS) // (2 * ROWS), 0)
        blocks = tl.minimum(blocks, T // (2 * ROWS))
        tl.debug_barrier()
        first, step = tabulate(
            R, TABLE, box, srk, PZ, PY, PX, blocks, a_low, a_high, r_low, r_high, r_mean,
            K, HEADS, N, K2, ROWS, BLOCK_J, EVEN, FIELDS,
        )  # fmt: skip
        tl.debug_barrier()
        return low, high, first, step, blocks * 2 * ROWS


@triton.jit
def grcsf_rcu_patch_forward(
    X, R, QW, QB, VW, VB, W1, B1, W2, B2, TABLE, OUT, SCORES,
    D, H, W, GZ, GY, GX, sxb, sxc, sxz, sxy, sxx, srk, patches, programs,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    KEYS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and scores of every ``programs``-th patch.

    ``TABLE`` [programs, K, T, 2] is where a program keeps its table. Tiling: BLOCK_V voxels x
    BLOCK_C channels, all columns of queries at once. Bytes: x, the maps and out once each (x and
    the maps again from cache).
    """
    program = tl.program_id(0).to(tl.int64)
    strides = (sxc, sxz, sxy, sxx, srk)
    TABLE += program * K * T * 2
    m = tl.arange(0, M2)
    for patch in tl.range(program, patches, programs, disable_licm=True):
        patch = tl.cast(patch, tl.int64)
        b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
        box = (z0, y0, x0, D, H, W)
        own_x, own_r = X + b * sxb, R + b * K * srk
        hidden, a_low, a_high, r_low, r_high, r_mean = survey(
            own_x, own_r, QW, QB, W1, X, box, strides, PZ, PY, PX, 0, PZ * PY * PX,
            C, K, HEADS, M, N, K2, M2, PARTS, BLOCK_V, BLOCK_C, EVEN, WIDE, PRECISION, False,
        )  # fmt: skip
        hidden += tl.load(B1 + b * M + m, mask=m < M, other=0.0)
        # Not a maximum, which would drop a NaN.
        active = tl.where(hidden <= 0, 0.0, hidden)
        logit = tl.sum(active * tl.load(W2 + m, mask=m < M, other=0.0)) + tl.load(B2)
        score = 1 / (1 + tl.exp(-logit))
        tl.store(SCORES + patch, score)
        low, high, first, step, nodes = prepare(
            own_r, TABLE, box, srk, PZ, PY, PX, a_low, a_high, r_low, r_high, r_mean,
            K, HEADS, N, K2, T, ROWS, BLOCK_J, STEP, EVEN, 2,
        )  # fmt: skip
        output_pass(
            own_x, own_r, QW, QB, VW, VB, OUT + b * sxb, box, strides, PZ, PY, PX,
            0, PZ * PY * PX, score, low, high, nodes > 0, TABLE, TABLE + 1, first, step, nodes,
            C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, EVEN, WIDE, PRECISION, 2,
        )  # fmt: skip


@triton.jit
def grcsf_rcu_patch_backward(
    GO, GS, SCORES, X, R, QW, QB, VW, VB, W1, B1, W2,
    TABLE, GRAD_X, MEANS, GRAD_SCORE, MEAN_GRADIENT, GRAD_QW, GRAD_QB, GRAD_VW, GRAD_VB,
    D, H, W, GZ, GY, GX, sxb, sxc, sxz, sxy, sxx, srk, patches, programs,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    KEYS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of every ``programs``-th patch.

    ``MEANS`` [patches, C + K] gets the means, ``GRAD_SCORE`` [patches] all that reaches the scores;
    ``TABLE`` [.., K, T, 3], ``MEAN_GRADIENT`` and the gradients of weights have a slot a program.
    Tiling as in forward. Bytes: x, the maps and the incoming gradient read once, the gradient of x
    written once, and the slots. Hazard: threads read the slot of ``MEAN_GRADIENT`` that others
    wrote; barriers around.
    """
    KH: tl.constexpr = K * HEADS
    program = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M2)
    strides = (sxc, sxz, sxy, sxx, srk)
    MEAN_GRADIENT += program * C
    TABLE += program * K * T * 3
    for patch in tl.range(program, patches, programs, disable_licm=True):
        patch = tl.cast(patch, tl.int64)
        b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
        box = (z0, y0, x0, D, H, W)
        own_x, own_go, own_r = X + b * sxb, GO + b * sxb, R + b * K * srk
        hidden, a_low, a_high, r_low, r_high, r_mean = survey(
            own_x, own_r, QW, QB, W1, MEANS + patch * (C + K), box, strides, PZ, PY, PX,
            0, PZ * PY * PX,
            C, K, HEADS, M, N, K2, M2, PARTS, BLOCK_V, BLOCK_C, EVEN, WIDE, PRECISION, True,
        )  # fmt: skip
        hidden += tl.load(B1 + b * M + m, mask=m < M, other=0.0)
        score = tl.load(SCORES + patch)
        low, high, first, step, nodes = prepare(
            own_r, TABLE, box, srk, PZ, PY, PX, a_low, a_high, r_low, r_high, r_mean,
            K, HEADS, N, K2, T, ROWS, BLOCK_J, STEP, EVEN, 3,
        )  # fmt: skip
        grad_score = tl.load(GS + patch) + value_pass(
            own_go, own_x, own_r, QW, QB, VW, VB,
            GRAD_VW + program * KH * C, GRAD_VB + program * C, box, strides,
            PZ, PY, PX, 0, PZ * PY * PX,
            score, low, high, nodes > 0, TABLE, TABLE + 1, first, step, nodes,
            C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, EVEN, WIDE, PRECISION, 3,
        )  # fmt: skip
        tl.store(GRAD_SCORE + patch, grad_score)
        grad_hidden = grad_score * score * (1 - score) * tl.load(W2 + m, mask=m < M, other=0.0)
        grad_hidden = tl.where(hidden <= 0, 0.0, grad_hidden)
        tl.debug_barrier()
        for c0 in tl.static_range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            weight = tl.load(
                W1 + m[:, None] * (C + K) + c[None, :],
                mask=(m < M)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            tl.store(MEAN_GRADIENT + c, tl.sum(weight * grad_hidden[:, None], axis=0), mask=c < C)
        tl.debug_barrier()
        query_pass(
            own_go, own_x, own_r, QW, QB, VW, GRAD_X + b * sxb, GRAD_QW + program * KH * C,
            GRAD_QB + program * KH, box, strides, PZ, PY, PX, 0, PZ * PY * PX,
            score, MEAN_GRADIENT, voxel_share(box, PZ, PY, PX, score),
            low, high, nodes > 0, TABLE + 1, TABLE + 2, first, step, nodes,
            C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, EVEN, WIDE, PRECISION, 3,
        )  # fmt: skip

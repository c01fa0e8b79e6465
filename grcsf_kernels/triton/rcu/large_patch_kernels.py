# SPDX-License-Identifier: Apache-2.0
"""``rcu`` where programs share a patch: one map channel, patches up to the whole volume.

Forward in four launches: a survey (means, ranges of a and r) in pieces of a patch; the table by a
reduction in two stages, pieces of the voxels and then their sum; one pass over the voxels that
reads it. Backward has two such passes. Work is linear in the voxels, however large the patch is.
How many nodes a table has is decided on the device, from ranges that the host never sees: the grid
has room for the most, and programs beyond what is needed end at once.

Bytes: x is read twice in forward, for the range of its queries and for the result.
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
def grcsf_rcu_volume_survey(
    X, R, QW, QB, W1, MEANS, A_LOW, A_HIGH, R_LOW, R_HIGH,
    D, H, W, GZ, GY, GX, PZ, PY, PX, sxb, sxc, sxz, sxy, sxx, srk, pieces, chunk,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K2: tl.constexpr, M2: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares in the means [C + K], and ranges of a [N] and r [K2], for each piece of a patch."""
    program = tl.program_id(0).to(tl.int64)
    patch, piece = program // pieces, (program % pieces).to(tl.int32)
    b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
    box = (z0, y0, x0, D, H, W)
    first = piece * chunk
    _hidden, a_low, a_high, r_low, r_high, _mean = survey(
        X + b * sxb, R + b * K * srk, QW, QB, W1, MEANS + program * (C + K), box,
        (sxc, sxz, sxy, sxx, srk), PZ, PY, PX, first, tl.minimum(first + chunk, PZ * PY * PX),
        C, K, HEADS, M, N, K2, M2, PARTS, BLOCK_V, BLOCK_C, False, WIDE, PRECISION, True,
    )  # fmt: skip
    n, k = tl.arange(0, N), tl.arange(0, K2)
    tl.store(A_LOW + program * N + n, a_low)
    tl.store(A_HIGH + program * N + n, a_high)
    tl.store(R_LOW + program * K2 + k, r_low)
    tl.store(R_HIGH + program * K2 + k, r_high)


@triton.jit
def grcsf_rcu_volume_table(
    R, RANGES, NODES_OF, PARTIAL,
    D, H, W, GZ, GY, GX, PZ, PY, PX, srk, blocks, splits, chunk,
    K: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
    FIELDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of powers at the nodes of one block, over one of ``splits`` pieces of a patch's voxels.

    ``RANGES`` [patches, K, 5]: first node, step, least, greatest and mean of r; ``NODES_OF``
    [patches]: nodes of the tables, 0 where there is none. ``PARTIAL`` [patches, K, splits, 4, T].
    """
    NODES: tl.constexpr = 2 * ROWS
    THIRD: tl.constexpr = FIELDS == 3
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    split = (program // blocks % splits).to(tl.int32)
    table = program // blocks // splits
    patch, each = table // K, table % K
    if block * NODES < tl.load(NODES_OF + patch):
        b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
        box = (z0, y0, x0, D, H, W)
        low, step = tl.load(RANGES + table * 5), tl.load(RANGES + table * 5 + 1)
        least, greatest = tl.load(RANGES + table * 5 + 2), tl.load(RANGES + table * 5 + 3)
        center = tl.load(RANGES + table * 5 + 4)
        node = low + (block * NODES + 2 * tl.arange(0, ROWS)).to(tl.float32) * step
        base = R + (b * K + each) * srk
        zeros = tl.zeros((ROWS, BLOCK_J), tl.float32)
        s0, s1, s2, s3 = zeros, zeros, zeros, zeros
        next0, next1, next2, next3 = zeros, zeros, zeros, zeros
        start = split * chunk
        for j0 in range(start, tl.minimum(start + chunk, PZ * PY * PX), BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            z, y, x, valid = place(j, box, PZ, PY, PX, False, WIDE)
            valid = valid & (j < start + chunk)
            r = tl.load(base + (z * H + y) * W + x, mask=valid, other=0.0).to(tl.float32)
            w0, w1, w2, w3, v0, v1, v2, v3 = moments(
                r, valid, node, step, least, greatest, center, THIRD
            )
            s0, s1, s2 = s0 + w0, s1 + w1, s2 + w2
            next0, next1, next2 = next0 + v0, next1 + v1, next2 + v2
            if THIRD:
                s3, next3 = s3 + w3, next3 + v3
        own = PARTIAL + (table * splits + split) * 4 * T + block * NODES + tl.arange(0, NODES)
        tl.store(own, interleaved(s0, next0))
        tl.store(own + T, interleaved(s1, next1))
        tl.store(own + 2 * T, interleaved(s2, next2))
        if THIRD:
            tl.store(own + 3 * T, interleaved(s3, next3))


@triton.jit
def grcsf_rcu_volume_finish(
    RANGES, NODES_OF, PARTIAL, TABLE, blocks, splits,
    K: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """``TABLE`` [patches, K, T, FIELDS]: mean, variance (and third cumulant), of all splits.

    A patch's tables lie one after the other with as many nodes as they have, not T each.
    """
    NODES: tl.constexpr = 2 * ROWS
    THIRD: tl.constexpr = FIELDS == 3
    program = tl.program_id(0).to(tl.int64)
    block, table = (program % blocks).to(tl.int32), program // blocks
    nodes = tl.load(NODES_OF + table // K)
    if block * NODES < nodes:
        node = block * NODES + tl.arange(0, NODES)
        s0 = tl.zeros((NODES,), tl.float32)
        s1, s2, s3 = s0, s0, s0
        own = PARTIAL + table * splits * 4 * T + node
        for _split in range(splits):
            s0 += tl.load(own)
            s1 += tl.load(own + T)
            s2 += tl.load(own + 2 * T)
            if THIRD:
                s3 += tl.load(own + 3 * T)
            own += 4 * T
        mean, variance, third = cumulants(s0, s1, s2, s3, tl.load(RANGES + table * 5 + 4))
        to = TABLE + table // K * K * T * FIELDS + (table % K * nodes + node) * FIELDS
        tl.store(to, mean)
        tl.store(to + 1, variance)
        if THIRD:
            tl.store(to + 2, third)


@triton.jit
def load_ranges(RANGES, NODES_OF, patch, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr):
    """By column: least and greatest r, first node and step; and how many nodes there are."""
    n = tl.arange(0, N)
    own = RANGES + (patch * K + tl.minimum(n // HEADS, K - 1)) * 5
    return (
        tl.load(own + 2),
        tl.load(own + 3),
        tl.load(own),
        tl.load(own + 1),
        tl.load(NODES_OF + patch),
    )


@triton.jit
def grcsf_rcu_volume_forward(
    X, R, QW, QB, VW, VB, SCORES, RANGES, NODES_OF, TABLE, OUT,
    D, H, W, GZ, GY, GX, PZ, PY, PX, sxb, sxc, sxz, sxy, sxx, srk, pieces, chunk,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    FIELDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out for one piece of a patch; the table is read through the first-level cache."""
    program = tl.program_id(0).to(tl.int64)
    patch, piece = program // pieces, (program % pieces).to(tl.int32)
    b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
    low, high, node, step, nodes = load_ranges(RANGES, NODES_OF, patch, K, HEADS, N)
    table = TABLE + patch * K * T * FIELDS
    first = piece * chunk
    output_pass(
        X + b * sxb, R + b * K * srk, QW, QB, VW, VB, OUT + b * sxb, (z0, y0, x0, D, H, W),
        (sxc, sxz, sxy, sxx, srk), PZ, PY, PX, first, tl.minimum(first + chunk, PZ * PY * PX),
        tl.load(SCORES + patch), low, high, nodes > 0, table, table + 1, node, step, nodes,
        C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, False, WIDE, PRECISION, FIELDS,
    )  # fmt: skip


@triton.jit
def grcsf_rcu_volume_values(
    GO, X, R, QW, QB, VW, VB, SCORES, RANGES, NODES_OF, TABLE, GRAD_SCORE, GRAD_VW, GRAD_VB,
    D, H, W, GZ, GY, GX, PZ, PY, PX, sxb, sxc, sxz, sxy, sxx, srk, pieces, chunk, items, programs,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    FIELDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, first pass over every ``programs``-th piece: gradients of scores and value weights.

    ``GRAD_SCORE`` [patches, pieces] gets what each piece adds; weights have a slot a program.
    """
    program = tl.program_id(0).to(tl.int64)
    for item in tl.range(program, items, programs, disable_licm=True):
        item = tl.cast(item, tl.int64)
        patch, piece = item // pieces, (item % pieces).to(tl.int32)
        b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
        low, high, node, step, nodes = load_ranges(RANGES, NODES_OF, patch, K, HEADS, N)
        table = TABLE + patch * K * T * FIELDS
        first = piece * chunk
        found = value_pass(
            GO + b * sxb, X + b * sxb, R + b * K * srk, QW, QB, VW, VB,
            GRAD_VW + program * K * HEADS * C, GRAD_VB + program * C, (z0, y0, x0, D, H, W),
            (sxc, sxz, sxy, sxx, srk), PZ, PY, PX, first, tl.minimum(first + chunk, PZ * PY * PX),
            tl.load(SCORES + patch), low, high, nodes > 0, table, table + 1, node, step, nodes,
            C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, False, WIDE, PRECISION, FIELDS,
        )  # fmt: skip
        tl.store(GRAD_SCORE + item, found)


@triton.jit
def grcsf_rcu_volume_queries(
    GO, X, R, QW, QB, VW, SCORES, MEAN_GRADIENT, RANGES, NODES_OF, TABLE, GRAD_X, GRAD_QW, GRAD_QB,
    D, H, W, GZ, GY, GX, PZ, PY, PX, sxb, sxc, sxz, sxy, sxx, srk, pieces, chunk, items, programs,
    C: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr,
    FIELDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, second pass: gradients of x and of query weights.

    ``MEAN_GRADIENT`` [patches, C + K] is that of the patch's means, known after the first pass.
    """
    program = tl.program_id(0).to(tl.int64)
    for item in tl.range(program, items, programs, disable_licm=True):
        item = tl.cast(item, tl.int64)
        patch, piece = item // pieces, (item % pieces).to(tl.int32)
        b, z0, y0, x0 = corner(patch, GZ, GY, GX, PZ, PY, PX)
        box = (z0, y0, x0, D, H, W)
        low, high, node, step, nodes = load_ranges(RANGES, NODES_OF, patch, K, HEADS, N)
        table = TABLE + patch * K * T * FIELDS
        first = piece * chunk
        score = tl.load(SCORES + patch)
        query_pass(
            GO + b * sxb, X + b * sxb, R + b * K * srk, QW, QB, VW, GRAD_X + b * sxb,
            GRAD_QW + program * K * HEADS * C, GRAD_QB + program * K * HEADS, box,
            (sxc, sxz, sxy, sxx, srk), PZ, PY, PX, first, tl.minimum(first + chunk, PZ * PY * PX),
            score, MEAN_GRADIENT + patch * (C + K), voxel_share(box, PZ, PY, PX, score),
            low, high, nodes > 0, table + 1, table + 2, node, step, nodes,
            C, K, HEADS, N, PARTS, BLOCK_V, BLOCK_C, KEYS, T, False, WIDE, PRECISION, FIELDS,
        )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""The gradient of the map through attention, in Triton: keys own their gradient.

    grad r_j = sum over heads and queries i of  p_ij (e_i . (r_j - E_i)) a_i + p_ij e_i

A first kernel gives each query and head what a key needs of it: the query a, e, the log of the sum
of its weights and e . E, 2 c + 2 numbers that lie [patch, head, number, query] in a workspace. In
the second one a program takes BLOCK_K keys of a patch, and goes through heads and blocks of
queries: four products on tensor cores and one exponential a pair. Nothing is written by two
programs.

The workspace of all queries would be larger than the gradients. It holds some patches at a time,
or, where one patch is too many, some of its queries: then the sums over the queries so far are read
back, from a float32 result. The kernels for a next part wait for the last one's (one stream), so
the workspace is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton.launch import blocks, launch, wide
from grcsf_kernels.triton.primitives import compute, dot
from grcsf_kernels.triton.rcu.direct.tiles import (
    LN2,
    LOG2E,
    corners,
    expectation,
    geometry,
    load_center,
    load_keys,
    narrow,
    nearest,
    patch_box,
    positions,
    project,
    tiles,
    voxel_offsets,
)
from grcsf_kernels.triton.rcu.means import means as patch_means

# The workspace: this share of the gradients of x and of the map, but no less than so many bytes.
_SHARE = 0.04
_LEAST_BYTES = 1 << 20


@triton.jit
def grcsf_rcu_attend_state(
    grad_out,
    x,
    residual,
    query_weight,
    query_bias,
    value_weight,
    scores,
    means,
    state,
    stride_b,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    channels,
    depth,
    height,
    width,
    patch_z,
    patch_y,
    patch_x,
    maps,
    heads,
    map_channels,
    first_patch,
    first_query,
    queries,
    query_blocks,
    LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SEGMENT: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What keys need of one head's queries, for BLOCK_Q of the ``queries`` of a patch.

    ``state`` [patches, K * heads, 2 c + 2, queries]: a in units of log2, e, the log2 of the sum of
    weights (infinite where there is no voxel, so that its weights are 0), and e . E about the
    center.
    """
    program = tl.program_id(0)
    head = program % (maps * heads)
    block = program // (maps * heads) % query_blocks
    own_patch = program // (maps * heads) // query_blocks
    patch = first_patch + own_patch
    place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
    strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
    corner, map_corner = corners(place, strides, depth, height, width)
    volume = tl.cast(depth, tl.int64) * height * width
    frame = (height, width, volume, patch_y, patch_x)
    sample = place[0].to(tl.int64)
    lane = tl.arange(0, LANES)
    k = head // heads
    center = load_center(means, patch, channels, maps, map_channels, k, LANES)
    plane = residual + (sample * maps + k) * map_channels * volume + map_corner

    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset, exists = voxel_offsets(
        first_query + query, place, strides, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
    )
    a = project(
        x + corner,
        offset,
        exists,
        stride_c,
        channels,
        query_weight + head * map_channels * channels,
        1,
        channels,
        map_channels,
        LANES,
        BLOCK_R,
        WIDE,
        PRECISION,
    )
    bias = tl.load(query_bias + head * map_channels + lane, mask=lane < map_channels, other=0)
    a = (a + bias[None, :]) * LOG2E
    top, total, mean = expectation(
        a,
        plane,
        center,
        patch_z * patch_y * patch_x,
        place,
        frame,
        map_channels,
        BLOCK_K,
        SEGMENT,
        PATCH_Y,
        PATCH_X,
        EVEN,
        WIDE,
        PRECISION,
    )
    own_value = value_weight + k * channels * heads * map_channels + head % heads * map_channels
    e = project(
        grad_out + corner,
        offset,
        exists,
        stride_c,
        channels,
        own_value,
        heads * map_channels,
        1,
        map_channels,
        LANES,
        BLOCK_R,
        WIDE,
        PRECISION,
    )
    e *= tl.load(scores + patch)
    log = tl.where(exists, top + tl.log2(total), float("inf"))
    row = own_patch.to(tl.int64) * (maps * heads) + head
    row = state + row * (2 * map_channels + 2) * queries + query
    valid = query < queries
    mask = valid[:, None] & (lane < map_channels)[None, :]
    where = row[:, None] + (lane * queries)[None, :]
    tl.store(where, nearest(a, PRECISION), mask=mask)
    tl.store(where + map_channels * queries, e, mask=mask)
    row += 2 * map_channels * queries
    tl.store(row, log, mask=valid)
    tl.store(row + queries, tl.sum(e * mean, axis=1), mask=valid)


@triton.jit
def grcsf_rcu_attend_map(
    residual,
    means,
    grad_means,
    state,
    grad_residual,
    channels,
    depth,
    height,
    width,
    patch_z,
    patch_y,
    patch_x,
    maps,
    heads,
    map_channels,
    first_patch,
    queries,
    key_blocks,
    ACCUMULATE: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of BLOCK_K keys of one map from ``queries`` queries of each of its heads.

    With HAS_MEANS also what comes through the means, from grad_means [patches, C + K * c]; with
    ACCUMULATE on top of what ``grad_residual`` holds. Sums start anew every SEGMENT queries.
    """
    program = tl.program_id(0)
    k = program % maps
    block = program // maps % key_blocks
    own_patch = program // maps // key_blocks
    patch = first_patch + own_patch
    place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
    sample, z, y, x, size_z, size_y, size_x = place
    volume = tl.cast(depth, tl.int64) * height * width
    frame = (height, width, volume, patch_y, patch_x)
    map_corner = (z.to(tl.int64) * height + y) * width + x
    corner = (sample.to(tl.int64) * maps + k) * map_channels * volume + map_corner
    lane = tl.arange(0, LANES)
    of_map = (lane < map_channels)[None, :]
    center = load_center(means, patch, channels, maps, map_channels, k, LANES)
    keys, exists = load_keys(
        residual + corner,
        block * BLOCK_K,
        center,
        place,
        frame,
        map_channels,
        LANES,
        BLOCK_K,
        PATCH_Y,
        PATCH_X,
        EVEN,
        WIDE,
        PRECISION,
    )
    dtype: tl.constexpr = keys.dtype
    found = tl.zeros((BLOCK_K, LANES), dtype)
    for head in range(k * heads, k * heads + heads):
        row = own_patch.to(tl.int64) * (maps * heads) + head
        row = state + row * (2 * map_channels + 2) * queries
        for segment in range(0, queries, SEGMENT):
            of_a = tl.zeros((BLOCK_K, LANES), dtype)
            of_e = tl.zeros((BLOCK_K, LANES), dtype)
            for first in range(segment, tl.minimum(segment + SEGMENT, queries), BLOCK_Q):
                query = first + tl.arange(0, BLOCK_Q)
                valid = query < queries
                mask = valid[:, None] & of_map
                where = row + query[:, None] + (lane * queries)[None, :]
                a = tl.load(where, mask=mask, other=0)
                e = tl.load(where + map_channels * queries, mask=mask, other=0)
                last = row + 2 * map_channels * queries + query
                log = tl.load(last, mask=valid, other=float("inf"))
                level = tl.load(last + queries, mask=valid, other=0)
                weights = tl.exp2(dot(keys, tl.trans(a), PRECISION) - log[None, :])
                pull = dot(keys, tl.trans(e), PRECISION) - level[None, :]
                of_a += dot(weights * pull, a, PRECISION)
                of_e += dot(weights, e, PRECISION)
            found += of_a * LN2 + of_e

    if HAS_MEANS:
        through = load_center(grad_means, patch, channels, maps, map_channels, k, LANES)
        count = (size_z.to(tl.int64) * size_y * size_x).to(dtype)
        found += (through / count)[None, :]
    voxel = block * BLOCK_K + tl.arange(0, BLOCK_K)
    z, y, x, exists = positions(voxel, place, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE)
    offset = (z * height + y) * width + x
    lane_offset = lane.to(tl.int64) * volume if WIDE else lane * volume.to(tl.int32)
    where = grad_residual + corner + offset[:, None] + lane_offset[None, :]
    mask = exists[:, None] & of_map
    if ACCUMULATE:
        found += compute(tl.load(where, mask=mask, other=0), PRECISION)
    tl.store(where, narrow(found, grad_residual), mask=mask)


def map_gradient(
    grad_out: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    patch: Sequence[int],
    *,
    means: Tensor | None = None,
    grad_means: Tensor | None = None,
) -> Tensor:
    """The gradient of the residual through attention, [B, K, c, *S], for any c.

    It is in the dtype of the data, or float32 where a patch is so large that its queries come in
    parts.

    Args:
        grad_out: like x, in the layout of x.
        scores: [B, *G].
        x: [B, C, *S], contiguous or channels-last.
        residual: [B, K, c, *S], contiguous.
        query_weight, query_bias, value_weight: as in :func:`grcsf_kernels.rcu`.
        patch: sizes per axis of S.
        means: [B * G, C + K * c] where they are known already.
        grad_means: of the same shape; given, what comes through the means is in the result.
    """
    own = geometry(x, patch)
    maps, heads, map_channels, _ = query_weight.shape
    if means is None:
        means = patch_means(x, residual, patch)
    state_tiles = tiles("state", own, x, residual, map_channels)
    map_tiles = tiles("map", own, x, residual, map_channels)

    per_query = maps * heads * (2 * map_channels + 2) * means.element_size()
    values = (x.numel() + residual.numel()) * x.element_size()
    budget = max(int(_SHARE * values), _LEAST_BYTES)
    block = state_tiles["BLOCK_Q"]
    queries = min(own.voxels, blocks(max(budget // per_query, 1), block) * block)
    patches = max(1, min(own.patches, budget // (per_query * own.voxels)))
    in_parts = queries < own.voxels
    dtype = means.dtype if in_parts else x.dtype
    grad_residual = torch.empty(residual.shape, dtype=dtype, device=x.device)
    state = means.new_empty((patches, maps * heads, 2 * map_channels + 2, queries))
    wider = {"WIDE": wide(x, residual, state)}
    key_blocks = blocks(own.voxels, map_tiles["BLOCK_K"])
    for first_patch in range(0, own.patches, patches):
        some = min(patches, own.patches - first_patch)
        for first in range(0, own.voxels, queries):
            part = min(queries, own.voxels - first)
            query_blocks = blocks(part, block)
            launch(
                grcsf_rcu_attend_state,
                some * query_blocks * maps * heads,
                grad_out,
                x,
                residual,
                query_weight,
                query_bias,
                value_weight,
                scores,
                means,
                state,
                *own.runtime(),
                maps,
                heads,
                map_channels,
                first_patch,
                first,
                part,
                query_blocks,
                **state_tiles | wider,
            )
            launch(
                grcsf_rcu_attend_map,
                some * key_blocks * maps,
                residual,
                means,
                means if grad_means is None else grad_means,
                state,
                grad_residual,
                *own.runtime()[5:],
                maps,
                heads,
                map_channels,
                first_patch,
                part,
                key_blocks,
                ACCUMULATE=first > 0,
                HAS_MEANS=grad_means is not None and first == 0,
                **map_tiles | wider,
            )
    return grad_residual

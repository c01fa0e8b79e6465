# SPDX-License-Identifier: Apache-2.0
"""Attention to maps of several channels, summed directly: the kernel of backward.

Tiling, precision and registers are those of ``forward_kernels``. Bytes: grad_out and x are read
once from memory and again from cache by every head; grad_x is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.primitives import add_to, compute, dot
from grcsf_kernels.triton.rcu.direct.tiles import (
    LOG2E,
    corners,
    expectation,
    load_center,
    load_keys,
    load_tile,
    narrow,
    nearest,
    patch_box,
    project,
    tile_offsets,
    voxel_offsets,
)


@triton.jit
def slopes(
    a,
    e,
    top,
    total,
    mean,
    plane,
    center,
    voxels,
    place,
    frame,
    map_channels,
    BLOCK_K: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient [BLOCK_Q, LANES] of one head's queries: the covariance of keys times e.

    sum_j p_ij (e_i . (r_j - E_i)) r_j, where p comes from the logits again. The difference is taken
    for each key, so that nothing large cancels. Arguments are those and the results of
    :func:`expectation`, and e [BLOCK_Q, LANES].
    """
    LANES: tl.constexpr = a.shape[1]
    level = tl.sum(e * mean, axis=1)
    found = tl.zeros(a.shape, a.dtype)
    for first in range(0, voxels, BLOCK_K):
        keys, exists = load_keys(
            plane,
            first,
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
        weights = tl.exp2(dot(a, tl.trans(keys), PRECISION) - top[:, None])
        weights = tl.where(exists[None, :], weights, 0.0)
        pull = dot(e, tl.trans(keys), PRECISION) - level[:, None]
        found += dot(weights * pull, keys, PRECISION)
    return found / total[:, None]


@triton.jit
def grcsf_rcu_attend_backward(
    grad_out,
    x,
    residual,
    query_weight,
    query_bias,
    value_weight,
    constant,
    scores,
    means,
    grad_x,
    partial,
    grad_score,
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
    query_blocks,
    groups,
    slots,
    items,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients but that of the map, from one pass over the queries.

    A program takes every ``slots``-th item (block of queries of a patch) of its group of channels.
    For each head two loops over keys: one for the expectation E, and one for the gradient of the
    queries, see :func:`slopes`. It writes

    - ``grad_x``: without what comes through the means of the patch, which need the gradient of the
      score first; ``grcsf_rcu_add_means_gradient`` adds that.
    - ``grad_score`` [items, groups]: sums of grad_out . y over the queries. They are taken as
      E . (value_weight^T grad_out), by the first group, so they need no y.
    - ``partial`` [slots, 2 K heads c C + K heads c + C], zeros at first: sums over the program's
      items for query_weight [K, heads, c, C], value_weight in the same order, query_bias and
      value_bias (of one map, all have the same).

    Hazards: a slot's channels of one group belong to one program, which reads and writes them for
    each item; the barrier after an item lets any of its threads read what any other wrote.
    """
    program = tl.program_id(0)
    group = program % groups
    slot = program // groups
    strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
    volume = tl.cast(depth, tl.int64) * height * width
    frame = (height, width, volume, patch_y, patch_x)
    voxels = patch_z * patch_y * patch_x
    lane = tl.arange(0, LANES)
    first_channel = group * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    total_lanes = maps * heads * map_channels
    own_slot = partial + slot.to(tl.int64) * ((2 * channels + 1) * total_lanes + channels)
    of_map = lane < map_channels
    of_weight = of_map[:, None] & (channel < channels)[None, :]

    for item in tl.range(slot, items, slots, disable_licm=True):
        patch = item // query_blocks
        query = item % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
        place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
        corner, map_corner = corners(place, strides, depth, height, width)
        sample = place[0].to(tl.int64)
        offset, exists = voxel_offsets(
            query, place, strides, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
        )
        score = tl.load(scores + patch)
        of_score = tl.zeros((BLOCK_Q,), dtype)
        of_x = tl.zeros((BLOCK_Q, BLOCK_C), dtype)
        for head in tl.range(0, maps * heads, disable_licm=True):
            k = head // heads
            center = load_center(means, patch, channels, maps, map_channels, k, LANES)
            plane = residual + (sample * maps + k) * map_channels * volume + map_corner
            own_query = query_weight + head * map_channels * channels
            own_value = value_weight + k * channels * heads * map_channels
            a = project(
                x + corner,
                offset,
                exists,
                stride_c,
                channels,
                own_query,
                1,
                channels,
                map_channels,
                LANES,
                BLOCK_R,
                WIDE,
                PRECISION,
            )
            bias = tl.load(query_bias + head * map_channels + lane, mask=of_map, other=0)
            a = nearest((a + bias[None, :]) * LOG2E, PRECISION)
            top, total, mean = expectation(
                a,
                plane,
                center,
                voxels,
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
            e = project(
                grad_out + corner,
                offset,
                exists,
                stride_c,
                channels,
                own_value + head % heads * map_channels,
                heads * map_channels,
                1,
                map_channels,
                LANES,
                BLOCK_R,
                WIDE,
                PRECISION,
            )
            expected = mean + center[None, :]
            of_score += tl.sum(expected * e, axis=1)
            expected = nearest(expected, PRECISION)
            row = (head * map_channels + lane)[:, None] * channels + channel[None, :]
            if NEEDS_WEIGHTS:
                tile = load_tile(
                    grad_out + corner,
                    offset,
                    exists,
                    first_channel,
                    stride_c,
                    channels,
                    BLOCK_C,
                    WIDE,
                )
                value = dot(tl.trans(expected), compute(tile, PRECISION), PRECISION)
                add_to(own_slot + total_lanes * channels + row, value * score, of_weight)
            if NEEDS_X or NEEDS_WEIGHTS:
                of_query = slopes(
                    a,
                    nearest(e * score, PRECISION),
                    top,
                    total,
                    mean,
                    plane,
                    center,
                    voxels,
                    place,
                    frame,
                    map_channels,
                    BLOCK_K,
                    PATCH_Y,
                    PATCH_X,
                    EVEN,
                    WIDE,
                    PRECISION,
                )
                of_query_bias = tl.sum(of_query, axis=0)
                of_query = nearest(of_query, PRECISION)
                if NEEDS_X:
                    weight = tl.load(
                        own_query + lane[:, None] * channels + channel[None, :],
                        mask=of_weight,
                        other=0,
                    )
                    of_x += dot(of_query, nearest(weight, PRECISION), PRECISION)
                if NEEDS_WEIGHTS:
                    tile = load_tile(
                        x + corner,
                        offset,
                        exists,
                        first_channel,
                        stride_c,
                        channels,
                        BLOCK_C,
                        WIDE,
                    )
                    value = dot(tl.trans(of_query), compute(tile, PRECISION), PRECISION)
                    add_to(own_slot + row, value, of_weight)
                    if group == 0:
                        add_to(
                            own_slot + 2 * total_lanes * channels + head * map_channels + lane,
                            of_query_bias,
                            of_map,
                        )

        tile = load_tile(
            grad_out + corner, offset, exists, first_channel, stride_c, channels, BLOCK_C, WIDE
        )
        own = compute(tile, PRECISION)
        if NEEDS_X:
            tl.store(
                grad_x + corner + tile_offsets(offset, first_channel, stride_c, BLOCK_C, WIDE),
                narrow(own + of_x, grad_x),
                mask=exists[:, None] & (channel < channels)[None, :],
            )
        if NEEDS_WEIGHTS:
            add_to(
                own_slot + (2 * channels + 1) * total_lanes + channel,
                tl.sum(own, axis=0) * score,
                channel < channels,
            )
        bias = tl.load(constant + channel, mask=channel < channels, other=0)
        found = tl.sum(own * bias[None, :])
        if group == 0:
            found += tl.sum(of_score)
        tl.store(grad_score + tl.cast(item, tl.int64) * groups + group, found)
        if NEEDS_WEIGHTS:
            tl.debug_barrier()

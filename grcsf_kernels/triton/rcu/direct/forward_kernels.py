# SPDX-License-Identifier: Apache-2.0
"""Attention to maps of several channels, summed directly: the kernel of forward.

*Tiling.* A program takes BLOCK_Q query voxels of one patch and a group of BLOCK_C output channels,
and loops over maps and heads. A head's queries are a product of the voxels' tile and its weight,
BLOCK_R channels at a time; keys come in blocks of BLOCK_K voxels, and the logits [BLOCK_Q, BLOCK_K]
never leave registers. Programs of one patch are neighbors, so its keys come from L1 and L2.

*Bytes.* x is read once from memory and again from cache by every head; out is written once. The
work is 2 * LANES multiply-adds, one exponential and some ten other instructions for each of the K *
heads * V * P logits: computation bounds these kernels, not memory.

*Precision.* Products are TF32 for half-precision data, in which it is exact, and three TF32 ones
for float32. What is the same for many keys or voxels is rounded to the nearest TF32 number first
(``nearest``): the hardware cuts off.

*Registers.* Nothing is moved out of the loops over heads and items (``disable_licm``): the compiler
would move the addresses of tiles, which take more registers than there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grcsf_kernels.triton.primitives import compute, dot
from grcsf_kernels.triton.rcu.direct.tiles import (
    LOG2E,
    corners,
    expectation,
    load_center,
    load_tile,
    narrow,
    nearest,
    patch_box,
    project,
    tile_offsets,
    voxel_offsets,
)


@triton.jit
def grcsf_rcu_attend_forward(
    x,
    residual,
    query_weight,
    query_bias,
    value_weight,
    constant,
    scores,
    means,
    out,
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
    """out = x + score * y for one block of queries and one group of channels.

    ``constant`` [C] is the sum of value_bias over maps, ``scores`` [patches] and ``means``
    [patches, C + K * c] are known. Hazards: none, each element of out is written by one program.
    """
    program = tl.program_id(0)
    group = program % groups
    block = program // groups % query_blocks
    patch = program // groups // query_blocks
    place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
    strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
    corner, map_corner = corners(place, strides, depth, height, width)
    volume = tl.cast(depth, tl.int64) * height * width
    frame = (height, width, volume, patch_y, patch_x)
    sample = place[0].to(tl.int64)
    voxels = patch_z * patch_y * patch_x

    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset, exists = voxel_offsets(
        query, place, strides, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
    )
    lane = tl.arange(0, LANES)
    first_channel = group * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    added = tl.zeros((BLOCK_Q, BLOCK_C), dtype)
    for head in tl.range(0, maps * heads, disable_licm=True):
        k = head // heads
        center = load_center(means, patch, channels, maps, map_channels, k, LANES)
        plane = residual + (sample * maps + k) * map_channels * volume + map_corner
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
        _top, _total, mean = expectation(
            nearest((a + bias[None, :]) * LOG2E, PRECISION),
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
        # value_weight [K, C, heads, c] as [c, C] of this head.
        own = k * channels * heads * map_channels + head % heads * map_channels
        weight = tl.load(
            value_weight + own + channel[None, :] * (heads * map_channels) + lane[:, None],
            mask=(channel < channels)[None, :] & (lane < map_channels)[:, None],
            other=0,
        )
        mean = nearest(mean + center[None, :], PRECISION)
        added += dot(mean, nearest(weight, PRECISION), PRECISION)

    score = tl.load(scores + patch)
    bias = tl.load(constant + channel, mask=channel < channels, other=0)
    tile = load_tile(x + corner, offset, exists, first_channel, stride_c, channels, BLOCK_C, WIDE)
    result = compute(tile, PRECISION) + score * (added + bias[None, :])
    tl.store(
        out + corner + tile_offsets(offset, first_channel, stride_c, BLOCK_C, WIDE),
        narrow(result, out),
        mask=exists[:, None] & (channel < channels)[None, :],
    )

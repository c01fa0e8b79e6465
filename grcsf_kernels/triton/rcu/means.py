# SPDX-License-Identifier: Apache-2.0
"""Means over patches and their gradient, in Triton, for patches of any size.

Both kernels give a program a piece of CHUNK voxels of one patch and BLOCK_C channels, and go
through the piece in tiles [BLOCK_V, BLOCK_C]. A patch of 8^3 voxels is one piece; the pieces of a
large one keep all of the GPU busy.

Bytes: the means read x and the residual once, the gradient reads and writes grad_x once. In a
contiguous volume a patch's rows are as short as the patch is wide, so a warp reads pieces of rows:
whole sectors of 32 bytes from 8 voxels of float32 or 16 of half precision on.

Hazards: none, no two programs write the same place. Means are summed in two stages, in a fixed
order: lanes of a tile and the tile here, pieces in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton.launch import blocks, launch, parameters, power_of_2, precision, wide
from grcsf_kernels.triton.primitives import compute
from grcsf_kernels.triton.rcu.direct.tiles import (
    Geometry,
    corners,
    geometry,
    load_tile,
    narrow,
    patch_box,
    positions,
    tile_offsets,
    voxel_offsets,
)


@triton.jit
def _piece(program, pieces, channel_blocks):
    """Patch, piece of it, and block of channels of a program: channel blocks change fastest."""
    block = program % channel_blocks
    rest = program // channel_blocks
    return rest // pieces, rest % pieces, block


@triton.jit
def grcsf_rcu_means(
    x,
    residual,
    partial,
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
    map_channels,
    pieces,
    x_blocks,
    all_blocks,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share of each piece in the means of its patch: ``partial`` [patches, pieces, C + K * c].

    ``map_channels`` is K * c here. The first ``x_blocks`` blocks of channels are those of x, the
    others those of the residual.
    """
    patch, piece, block = _piece(tl.program_id(0), pieces, all_blocks)
    place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
    strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
    corner, map_corner = corners(place, strides, depth, height, width)
    sample, _z, _y, _x, size_z, size_y, size_x = place
    dtype: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    count = size_z.to(tl.int64) * size_y * size_x
    start = piece.to(tl.int64) * CHUNK if WIDE else piece * CHUNK
    row = partial + (patch.to(tl.int64) * pieces + piece) * (channels + map_channels)
    sums = tl.zeros((BLOCK_V, BLOCK_C), dtype)
    if block < x_blocks:
        first_channel = block * BLOCK_C
        for first in range(0, CHUNK, BLOCK_V):
            voxel = start + first + tl.arange(0, BLOCK_V)
            offset, exists = voxel_offsets(
                voxel, place, strides, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
            )
            tile = load_tile(
                x + corner, offset, exists, first_channel, stride_c, channels, BLOCK_C, WIDE
            )
            sums += compute(tile, PRECISION)
        channel = first_channel + tl.arange(0, BLOCK_C)
        mean = tl.sum(sums, axis=0) / count.to(dtype)
        tl.store(row + channel, mean, mask=channel < channels)
    else:
        first_channel = (block - x_blocks) * BLOCK_C
        volume = tl.cast(depth, tl.int64) * height * width
        plane = residual + sample.to(tl.int64) * map_channels * volume + map_corner
        stride = volume if WIDE else volume.to(tl.int32)
        for first in range(0, CHUNK, BLOCK_V):
            voxel = start + first + tl.arange(0, BLOCK_V)
            z, y, x_own, exists = positions(
                voxel, place, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
            )
            offset = (z * height + y) * width + x_own
            tile = load_tile(
                plane, offset, exists, first_channel, stride, map_channels, BLOCK_C, WIDE
            )
            sums += compute(tile, PRECISION)
        channel = first_channel + tl.arange(0, BLOCK_C)
        mean = tl.sum(sums, axis=0) / count.to(dtype)
        tl.store(row + channels + channel, mean, mask=channel < map_channels)


@triton.jit
def grcsf_rcu_add_means_gradient(
    grad_x,
    grad_means,
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
    columns,
    pieces,
    all_blocks,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to grad_x, in place, grad_means [patches, columns] over the voxels of the patch."""
    patch, piece, block = _piece(tl.program_id(0), pieces, all_blocks)
    place = patch_box(patch, depth, height, width, patch_z, patch_y, patch_x)
    strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
    corner, _map_corner = corners(place, strides, depth, height, width)
    _sample, _z, _y, _x, size_z, size_y, size_x = place
    first_channel = block * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    row = grad_means + patch.to(tl.int64) * columns
    added = tl.load(row + channel, mask=channel < channels, other=0)
    added = added / (size_z.to(tl.int64) * size_y * size_x).to(added.dtype)
    start = piece.to(tl.int64) * CHUNK if WIDE else piece * CHUNK
    for first in range(0, CHUNK, BLOCK_V):
        voxel = start + first + tl.arange(0, BLOCK_V)
        offset, exists = voxel_offsets(
            voxel, place, strides, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE
        )
        where = grad_x + corner + tile_offsets(offset, first_channel, stride_c, BLOCK_C, WIDE)
        mask = exists[:, None] & (channel < channels)[None, :]
        own = compute(tl.load(where, mask=mask, other=0), PRECISION) + added[None, :]
        tl.store(where, narrow(own, grad_x), mask=mask)


def _tiles(own: Geometry, x: Tensor, residual: Tensor | None) -> tuple[int, dict[str, Any]]:
    """Pieces of a patch, and constants of a kernel of this file."""
    sizes = parameters("rcu_direct", "means", x)
    sizes["BLOCK_C"] = min(sizes["BLOCK_C"], power_of_2(own.channels))
    sizes["BLOCK_V"] = min(sizes["BLOCK_V"], power_of_2(own.voxels))
    sizes["CHUNK"] = min(sizes["CHUNK"], sizes["BLOCK_V"] * blocks(own.voxels, sizes["BLOCK_V"]))
    constants = {
        **sizes,
        **own.constants(sizes["CHUNK"], sizes["BLOCK_V"]),
        "WIDE": wide(x, residual),
        "PRECISION": precision(x),
    }
    return blocks(own.voxels, sizes["CHUNK"]), constants


def means(x: Tensor, residual: Tensor, patch: Sequence[int]) -> Tensor:
    """Means over the existing voxels of each patch, [B * G, C + K * c] in the type of sums.

    Args:
        x: [B, C, *S], contiguous or channels-last.
        residual: [B, K, c, *S], contiguous.
        patch: sizes per axis of S.
    """
    own = geometry(x, patch)
    map_channels = residual.shape[1] * residual.shape[2]
    pieces, constants = _tiles(own, x, residual)
    x_blocks = blocks(own.channels, constants["BLOCK_C"])
    all_blocks = x_blocks + blocks(map_channels, constants["BLOCK_C"])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (own.patches, pieces, own.channels + map_channels)
    partial = torch.empty(shape, dtype=dtype, device=x.device)
    launch(
        grcsf_rcu_means,
        own.patches * pieces * all_blocks,
        x,
        residual,
        partial,
        *own.runtime(),
        map_channels,
        pieces,
        x_blocks,
        all_blocks,
        **constants,
    )
    return partial.sum(dim=1) if pieces > 1 else partial.flatten(0, 1)


def add_means_gradient(grad_x: Tensor, grad_means: Tensor, patch: Sequence[int]) -> None:
    """Add to grad_x [B, C, *S], in place, what reaches it through the means of its patches.

    Args:
        grad_x: contiguous or channels-last.
        grad_means: [B * G, C + K * c], contiguous.
        patch: sizes per axis of S.
    """
    own = geometry(grad_x, patch)
    pieces, constants = _tiles(own, grad_x, None)
    all_blocks = blocks(own.channels, constants["BLOCK_C"])
    launch(
        grcsf_rcu_add_means_gradient,
        own.patches * pieces * all_blocks,
        grad_x,
        grad_means,
        *own.runtime(),
        grad_means.shape[1],
        pieces,
        all_blocks,
        **constants,
    )

# SPDX-License-Identifier: Apache-2.0
"""``gcu`` in Triton, forward; see ``backward_kernels`` for the other direction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton import launch
from grcsf_kernels.triton.gcu.interpolation import block_of, inverse_norm, offsets, tile_of
from grcsf_kernels.triton.gcu.tiling import sizes, tiling, volume


def forward(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(compensated, dissimilarity)``; see :func:`grcsf_kernels.gcu`."""
    compensated = torch.empty_like(skip)
    dissimilarity = skip.new_empty((skip.shape[0], 1, *skip.shape[2:]))
    features, deep = volume(skip), volume(deep)
    tiles = tiling("forward", features, deep)
    programs = tiles.programs(features.shape[2])
    launch.launch(
        grcsf_gcu_forward,
        skip.shape[0] * programs,
        features,
        deep,
        skip_gate,
        deep_gate,
        compensated,
        dissimilarity,
        programs,
        tiles.columns,
        tiles.units(features.shape[2]),
        *sizes(features, deep),
        SIMILARITY=compensation == "similarity",
        EPS=eps,
        **tiles.constants,
    )
    return compensated, dissimilarity


@triton.jit
def grcsf_gcu_forward(
    skip,
    deep,
    skip_gate,
    deep_gate,
    compensated,
    dissimilarity,
    programs,
    columns,
    units,
    channels,
    depth,
    height,
    width,
    voxels,
    deep_depth,
    deep_height,
    deep_width,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_X: tl.constexpr,
    ALONG_X: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    TAPS_Z: tl.constexpr,
    TAPS_Y: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    SIMILARITY: tl.constexpr,
    EPS: tl.constexpr,
):
    """One program compensates up to TILES tiles of voxels of one sample, all channels.

    Bytes: skip [B, C, V] once, compensated [B, C, V] and dissimilarity [B, V] written once; deep
    [B, C, V'] comes from the caches. Up to BLOCK_C channels stay in registers between the
    similarity and the output (ONE_BLOCK). More are taken in blocks, and skip is read again for the
    output: the tile was read microseconds before, so it comes from the L2 cache, which costs less
    than the registers that would hold all channels. No program writes what another one reads.
    """
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    program = program % programs
    column = program % columns
    group = program // columns
    skip += sample * channels * voxels
    compensated += sample * channels * voxels
    deep += sample * channels * deep_depth * deep_height * deep_width
    skip_gate += sample * channels
    deep_gate += sample * channels
    space = (depth, height, width)
    deep_space = (deep_depth, deep_height, deep_width)
    for turn in range(0, tl.minimum(TILES, units - group * TILES)):
        unit = group * TILES + turn
        voxel = tile_of(unit, column, 0, depth, space, BLOCK_V, ROWS, EVEN_V, WIDE)
        if ONE_BLOCK:
            at, mask, value, own, up = block_of(
                skip,
                deep,
                skip_gate,
                deep_gate,
                0,
                voxel,
                channels,
                space,
                deep_space,
                BLOCK_C,
                BLOCK_X,
                ALONG_X,
                WHOLE,
                TAPS_Z,
                TAPS_Y,
                CHANNELS_LAST,
                EVEN_C,
                WIDE,
            )
            products = tl.sum(own * up, axis=0)
            skip_squares = tl.sum(own * own, axis=0)
            deep_squares = tl.sum(up * up, axis=0)
        else:
            products = tl.zeros([BLOCK_V], skip_gate.dtype.element_ty)
            skip_squares = products
            deep_squares = products
            for c0 in range(0, channels, BLOCK_C):
                at, mask, value, own, up = block_of(
                    skip,
                    deep,
                    skip_gate,
                    deep_gate,
                    c0,
                    voxel,
                    channels,
                    space,
                    deep_space,
                    BLOCK_C,
                    BLOCK_X,
                    ALONG_X,
                    WHOLE,
                    TAPS_Z,
                    TAPS_Y,
                    CHANNELS_LAST,
                    EVEN_C,
                    WIDE,
                )
                products += tl.sum(own * up, axis=0)
                skip_squares += tl.sum(own * own, axis=0)
                deep_squares += tl.sum(up * up, axis=0)

        # One after the other: the product of two inverse eps could overflow.
        cosine = products * inverse_norm(skip_squares, EPS) * inverse_norm(deep_squares, EPS)
        first, _, _, _, _, inside = voxel
        flat = first + tl.arange(0, BLOCK_V)
        tl.store(dissimilarity + sample * voxels + flat, 1 - cosine, mask=inside)
        factor = 1 + cosine if SIMILARITY else 2 - cosine
        if ONE_BLOCK:
            tl.store(compensated + at, value * factor[None, :], mask=mask)
        else:
            for c0 in range(0, channels, BLOCK_C):
                channel = c0 + tl.arange(0, BLOCK_C)
                at = offsets(channel, flat, channels, voxels, CHANNELS_LAST, WIDE)
                mask = (channel < channels)[:, None] & inside[None, :]
                value = tl.load(skip + at, mask=mask, other=0.0).to(factor.dtype)
                tl.store(compensated + at, value * factor[None, :], mask=mask)

# SPDX-License-Identifier: Apache-2.0
"""``gcu`` backward in Triton: a pass over voxels, then deep voxels gather their gradient.

With f the gated skip, u the gated and upsampled deep tensor, m and n their norms and g the gradient
that reaches the cosine, the gradient of f is g (u / (m n) - cos f / m^2), and that of u is
alpha f - beta u with two numbers a voxel, alpha = g / (m n) and beta = g cos / n^2. The first
kernel writes the gradient of skip, and alpha and beta; the second one (``deep_gradient``) applies
the transposed interpolation to the gradient of u, which it makes from skip, deep, alpha and beta.
So the gradient of the upsampled tensor never exists in memory, and nothing is atomic.

alpha and beta take 8 bytes a voxel. Where that is more than a few percent of the gradients, the two
kernels take turns on slabs of planes, and the planes of alpha and beta lie in a ring: plane z at
z % ring.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton import launch
from grcsf_kernels.triton.gcu.deep_gradient import gathering, grcsf_gcu_backward_deep
from grcsf_kernels.triton.gcu.interpolation import block_of, inverse_norm, tile_of
from grcsf_kernels.triton.gcu.tiling import sizes, tiling, volume

# alpha and beta of all planes at once, if they are not larger than this, or than this share of the
# gradients.
_SMALL_WORKSPACE = 1 << 20
_WORKSPACE_SHARE = 0.03


def backward(
    grad_compensated: Tensor,
    grad_dissimilarity: Tensor,
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    compensation: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of skip, deep, skip_gate and deep_gate (None where not needed)."""
    grad_skip = torch.empty_like(skip) if needs[0] else None
    grad_deep = torch.empty_like(deep) if needs[1] else None
    batch, channels = skip.shape[:2]
    skip, deep = volume(skip), volume(deep)
    depth, height, width = skip.shape[2:]
    deep_depth = deep.shape[2]
    wants_deep = needs[1] or needs[3]

    ring = ring_planes(skip, deep) if wants_deep else depth
    cut = slabs(depth, deep_depth, ring) if wants_deep else ((0, depth, 0, 0),)
    factors = skip_gate.new_empty((2, batch, ring, height, width) if wants_deep else (2, 0))

    tiles = tiling("voxels", skip, deep)
    groups = [tiles.programs(end - begin) for begin, end, *_ in cut]
    skip_sums = skip_gate.new_zeros((batch, sum(groups), channels) if needs[2] else (0,))
    rows = gathering(skip, deep)
    column_blocks = rows.pop("COLUMN_BLOCKS")
    row_tiles = [
        launch.blocks((end - begin) * deep.shape[3], rows["TILE_ROWS"]) for *_, begin, end in cut
    ]
    deep_sums = deep_gate.new_zeros(
        (batch, sum(row_tiles) * column_blocks, channels) if needs[3] else (0,)
    )

    done = deep_done = 0
    for (begin, end, deep_begin, deep_end), programs, deep_programs in zip(
        cut, groups, row_tiles, strict=True
    ):
        launch.launch(
            grcsf_gcu_backward_voxels,
            batch * programs,
            skip,
            deep,
            skip_gate,
            deep_gate,
            grad_compensated,
            grad_dissimilarity,
            skip if grad_skip is None else grad_skip,
            skip_sums,
            factors[0],
            factors[1],
            programs,
            done,
            sum(groups),
            tiles.columns,
            tiles.units(end - begin),
            begin,
            end,
            ring,
            *sizes(skip, deep),
            WANTS_SKIP=needs[0],
            WANTS_SKIP_GATE=needs[2],
            WANTS_DEEP=wants_deep,
            SIMILARITY=compensation == "similarity",
            EPS=eps,
            **tiles.constants,
        )
        done += programs
        if not wants_deep:
            continue
        launch.launch(
            grcsf_gcu_backward_deep,
            batch * deep_programs * launch.blocks(channels, rows["BLOCK_C"]) * column_blocks,
            skip,
            deep,
            skip_gate,
            deep_gate,
            factors[0],
            factors[1],
            deep if grad_deep is None else grad_deep,
            deep_sums,
            deep_begin * deep.shape[3],
            deep_end * deep.shape[3],
            deep_done,
            sum(row_tiles),
            ring,
            *(min(s, -(-2 * s // d)) for s, d in zip(skip.shape[2:], deep.shape[2:], strict=True)),
            column_blocks,
            *sizes(skip, deep),
            WANTS_DEEP=needs[1],
            WANTS_DEEP_GATE=needs[3],
            **rows,
        )
        deep_done += deep_programs
    return (
        grad_skip,
        grad_deep,
        skip_sums.sum(1) if needs[2] else None,
        deep_sums.sum(1) if needs[3] else None,
    )


def first_of(plane: int, depth: int, deep_depth: int) -> int:
    """The first plane that takes from deep planes >= ``plane``."""
    numerator = (2 * plane - 1) * depth - deep_depth
    return 0 if numerator < 0 else numerator // (2 * deep_depth) + 1


def end_of(plane: int, depth: int, deep_depth: int) -> int:
    """One past the last plane that takes from deep planes <= ``plane``."""
    if plane >= deep_depth - 1:
        return depth
    return min(max(-((deep_depth - (2 * plane + 3) * depth) // (2 * deep_depth)), 0), depth)


def ring_planes(skip: Tensor, deep: Tensor) -> int:
    """How many planes of alpha and beta are kept."""
    depth, deep_depth = skip.shape[2], deep.shape[2]
    weight = torch.float64.itemsize if skip.dtype == torch.float64 else torch.float32.itemsize
    plane = 2 * weight * skip.shape[0] * skip.shape[3] * skip.shape[4]
    share = int(_WORKSPACE_SHARE * (skip.numel() + deep.numel()) * skip.dtype.itemsize)
    planes = max(_SMALL_WORKSPACE, share) // max(plane, 1)
    if planes >= depth:
        return depth
    return min(max(planes, 2 * longest_run(depth, deep_depth)), depth)


def longest_run(depth: int, deep_depth: int) -> int:
    """The most planes that one deep plane takes from; a ring must hold as many."""
    return max(
        1,
        *(end_of(j, depth, deep_depth) - first_of(j, depth, deep_depth) for j in range(deep_depth)),
    )


@functools.lru_cache
def slabs(depth: int, deep_depth: int, ring: int) -> tuple[tuple[int, int, int, int], ...]:
    """Slabs (begin, end, deep_begin, deep_end): planes, and the deep planes complete with them.

    Planes that a deep plane still waits for stay in the ring, so ``ring`` must hold all planes that
    any one deep plane takes from.
    """
    found = []
    begin = deep_begin = 0
    while begin < depth or deep_begin < deep_depth:
        waiting = min(begin, first_of(deep_begin, depth, deep_depth))
        end = min(depth, waiting + ring)
        deep_end = deep_begin
        while deep_end < deep_depth and end_of(deep_end, depth, deep_depth) <= end:
            deep_end += 1
        found.append((begin, end, deep_begin, deep_end))
        begin, deep_begin = end, deep_end
    return tuple(found)


@triton.jit(do_not_specialize=["done", "all_programs", "units", "begin", "end"])
def grcsf_gcu_backward_voxels(
    skip,
    deep,
    skip_gate,
    deep_gate,
    grad,
    grad_dissimilarity,
    grad_skip,
    sums,
    cross,
    radial,
    programs,
    done,
    all_programs,
    columns,
    units,
    begin,
    end,
    ring,
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
    WANTS_SKIP: tl.constexpr,
    WANTS_SKIP_GATE: tl.constexpr,
    WANTS_DEEP: tl.constexpr,
    SIMILARITY: tl.constexpr,
    EPS: tl.constexpr,
):
    """One program differentiates up to TILES tiles of voxels of planes [begin, end), all channels.

    It writes grad_skip [B, C, V], alpha in ``cross`` and beta in ``radial``, both [B, ring, H, W],
    and in ``sums`` [B, all_programs, C] the sum over its voxels of (gradient of f) * skip, for the
    gate.

    Bytes: skip and grad [B, C, V] read once, grad_skip written once, 8 bytes a voxel of alpha and
    beta, and deep from the caches. More than BLOCK_C channels are read twice, as in the forward
    kernel; then the sums are read and written by the program that owns them, with a barrier
    between two tiles. The sums of a program are its own, so nothing is atomic.
    """
    DTYPE: tl.constexpr = skip_gate.dtype.element_ty
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    program = program % programs
    column = program % columns
    group = program // columns
    skip += sample * channels * voxels
    grad += sample * channels * voxels
    grad_skip += sample * channels * voxels
    grad_dissimilarity += sample * voxels
    deep += sample * channels * deep_depth * deep_height * deep_width
    skip_gate += sample * channels
    deep_gate += sample * channels
    cross += sample * ring * height * width
    radial += sample * ring * height * width
    sums += (sample * all_programs + done + program) * channels
    space = (depth, height, width)
    deep_space = (deep_depth, deep_height, deep_width)
    gate_sum = tl.zeros([BLOCK_C], DTYPE)
    for turn in range(0, tl.minimum(TILES, units - group * TILES)):
        unit = group * TILES + turn
        voxel = tile_of(unit, column, begin, end, space, BLOCK_V, ROWS, EVEN_V, WIDE)
        first, z, _, _, _, inside = voxel
        flat = first + tl.arange(0, BLOCK_V)
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
            grad_value = tl.load(grad + at, mask=mask, other=0.0).to(DTYPE)
            products = tl.sum(own * up, axis=0)
            skip_squares = tl.sum(own * own, axis=0)
            deep_squares = tl.sum(up * up, axis=0)
            strength_grad = tl.sum(grad_value * value, axis=0)
        else:
            products = tl.zeros([BLOCK_V], DTYPE)
            skip_squares = products
            deep_squares = products
            strength_grad = products
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
                grad_value = tl.load(grad + at, mask=mask, other=0.0).to(DTYPE)
                products += tl.sum(own * up, axis=0)
                skip_squares += tl.sum(own * own, axis=0)
                deep_squares += tl.sum(up * up, axis=0)
                strength_grad += tl.sum(grad_value * value, axis=0)

        own_inverse = inverse_norm(skip_squares, EPS)
        up_inverse = inverse_norm(deep_squares, EPS)
        cosine = products * own_inverse * up_inverse
        to_cosine = strength_grad if SIMILARITY else -strength_grad
        to_cosine -= tl.load(grad_dissimilarity + flat, mask=inside, other=0.0).to(DTYPE)
        alpha = to_cosine * own_inverse * up_inverse
        # Where the norm is at its floor, nothing goes through it.
        own_radial = to_cosine * cosine * own_inverse * own_inverse
        own_radial = tl.where(tl.sqrt(skip_squares) > EPS, own_radial, 0)
        factor = 1 + cosine if SIMILARITY else 2 - cosine
        if WANTS_DEEP:
            beta = to_cosine * cosine * up_inverse * up_inverse
            beta = tl.where(tl.sqrt(deep_squares) > EPS, beta, 0)
            # Plane z lies at z % ring.
            at_factor = flat + ((z % ring) - z) * height * width
            tl.store(cross + at_factor, alpha, mask=inside)
            tl.store(radial + at_factor, beta, mask=inside)
        if WANTS_SKIP or WANTS_SKIP_GATE:
            if ONE_BLOCK:
                own_grad = alpha[None, :] * up - own_radial[None, :] * own
                if WANTS_SKIP:
                    gates = tl.load(
                        skip_gate + tl.arange(0, BLOCK_C),
                        mask=tl.arange(0, BLOCK_C) < channels,
                        other=0.0,
                    )
                    result = grad_value * factor[None, :] + own_grad * gates[:, None]
                    tl.store(grad_skip + at, result, mask=mask)
                gate_sum += tl.sum(tl.where(mask, own_grad * value, 0.0), axis=1)
            else:
                # What the last turn added to the sums is there for all threads.
                tl.debug_barrier()
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
                    grad_value = tl.load(grad + at, mask=mask, other=0.0).to(DTYPE)
                    own_grad = alpha[None, :] * up - own_radial[None, :] * own
                    channel = c0 + tl.arange(0, BLOCK_C)
                    if WANTS_SKIP:
                        gates = tl.load(skip_gate + channel, mask=channel < channels, other=0.0)
                        result = grad_value * factor[None, :] + own_grad * gates[:, None]
                        tl.store(grad_skip + at, result, mask=mask)
                    if WANTS_SKIP_GATE:
                        one = tl.sum(tl.where(mask, own_grad * value, 0.0), axis=1)
                        before = tl.load(sums + channel, mask=channel < channels, other=0.0)
                        tl.store(sums + channel, before + one, mask=channel < channels)
    if ONE_BLOCK and WANTS_SKIP_GATE:
        channel = tl.arange(0, BLOCK_C)
        tl.store(sums + channel, gate_sum, mask=channel < channels)

# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``gcu`` in which deep voxels gather their gradient; see ``backward_kernels``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton import launch
from grcsf_kernels.triton.gcu.interpolation import (
    channels_of,
    distance,
    first_touched,
    last_touched,
    offsets,
)
from grcsf_kernels.triton.gcu.tiling import is_channels_last, is_wide

# Rows up to this one are short.
_SHORT_ROW = 64


def gathering(skip: Tensor, deep: Tensor) -> dict[str, Any]:
    """Constants of the kernel over deep rows, and COLUMN_BLOCKS, the blocks in a deep row.

    A tile of skip has TILE elements, of up to BLOCK_V voxels. The table's shape class "short_rows"
    is for contiguous data: several rows in a tile take more registers, as every lane has its own z
    and y.
    """
    contiguous = not is_channels_last(skip)
    shape = "short_rows" if contiguous and skip.shape[4] <= _SHORT_ROW else "any"
    constants = launch.parameters("gcu", "deep", skip, shape)
    elements, block_v = constants.pop("TILE"), constants.pop("BLOCK_V")
    block_j = constants.pop("BLOCK_J")
    channels, deep_width = skip.shape[1], deep.shape[4]
    row_v = min(block_v, launch.power_of_2(skip.shape[4]))
    row_j = min(block_j, launch.power_of_2(deep_width))
    halo = row_j < deep_width
    rows = 1
    if not halo and row_v >= skip.shape[4]:
        rows = min(block_v // row_v, block_j // row_j)
        rows = min(rows, launch.power_of_2(deep.shape[2] * deep.shape[3]))
    block_c = min(max(elements // (rows * row_v), 1), launch.power_of_2(channels))
    return constants | {
        "COLUMN_BLOCKS": launch.blocks(deep_width, row_j - 2) if halo else 1,
        "BLOCK_C": block_c,
        "TILE_ROWS": rows,
        "ROW_V": row_v,
        "ROW_J": row_j,
        "HALO": halo,
        "AROUND_Z": 3 if deep.shape[2] > 1 else 1,
        "AROUND_Y": 3 if deep.shape[3] > 1 else 1,
        "CHANNELS_LAST": not contiguous,
        "EVEN_C": channels % block_c == 0,
        "WIDE": is_wide(skip, deep),
    }


@triton.jit
def add_row(sums, values, distance, weight, AROUND: tl.constexpr):
    """Add ``values`` [V] to the sums of the deep rows before, at and after one in its plane."""
    if AROUND == 1:
        return (sums[0] + values * weight,)
    else:
        return (
            sums[0] + values * tl.maximum(-distance, 0),
            sums[1] + values * weight,
            sums[2] + values * tl.maximum(distance, 0),
        )


@triton.jit
def add_plane(sums, plane_sums, weight, AROUND: tl.constexpr):
    """Add the weighted sums of a plane."""
    if AROUND == 1:
        return (sums[0] + plane_sums[0] * weight,)
    else:
        return (
            sums[0] + plane_sums[0] * weight,
            sums[1] + plane_sums[1] * weight,
            sums[2] + plane_sums[2] * weight,
        )


@triton.jit
def add_columns(near, sums, index, left, middle, right, AROUND: tl.constexpr):
    """Add voxels ``index`` of the sums to K [J]: for each row its left, own and right column."""
    one = tl.gather(sums[0], index, axis=0)
    if AROUND == 1:
        return (near[0] + one * left, near[1] + one * middle, near[2] + one * right)
    else:
        two = tl.gather(sums[1], index, axis=0)
        three = tl.gather(sums[2], index, axis=0)
        return (
            near[0] + one * left,
            near[1] + one * middle,
            near[2] + one * right,
            near[3] + two * left,
            near[4] + two * middle,
            near[5] + two * right,
            near[6] + three * left,
            near[7] + three * middle,
            near[8] + three * right,
        )


@triton.jit(do_not_specialize=["row_begin", "row_end", "done", "all_row_tiles"])
def grcsf_gcu_backward_deep(
    skip,
    deep,
    skip_gate,
    deep_gate,
    cross,
    radial,
    grad_deep,
    sums,
    row_begin,
    row_end,
    done,
    all_row_tiles,
    ring,
    longest_z,
    longest_y,
    longest_x,
    column_blocks,
    channels,
    depth,
    height,
    width,
    voxels,
    deep_depth,
    deep_height,
    deep_width,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_V: tl.constexpr,
    ROW_J: tl.constexpr,
    HALO: tl.constexpr,
    AROUND_Z: tl.constexpr,
    AROUND_Y: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN_C: tl.constexpr,
    WIDE: tl.constexpr,
    WANTS_DEEP: tl.constexpr,
    WANTS_DEEP_GATE: tl.constexpr,
):
    """One program gathers the gradient of TILE_ROWS deep rows, ROW_J columns, BLOCK_C channels.

    With w_vj the weight of deep voxel j in voxel v, the gradient of the gated deep tensor is
    sum_v w_vj alpha_v f_v - sum_v w_vj beta_v u_v. For the first term the rows of skip that take
    from a deep row are added, weighted, into one row in registers, and that row is gathered along
    x. For the second one, u_v = sum_k w_vk deep_k, so it is sum_k K_jk deep_k over the deep voxels
    k next to j, with K_jk = sum_v w_vj w_vk beta_v: beta is added into one row for each of the (up
    to 9) pairs of deep rows, and gathered along x with the three products of weights. K is the same
    for all channels, and symmetric, so that what k gives to its neighbors along x is made at k.

    Lanes are TILE_ROWS rows of ROW_V voxels, and TILE_ROWS rows of ROW_J deep voxels. Several rows
    where a row is short; else blocks of columns that overlap by 2 (HALO), for the neighbors.

    Bytes: grad_deep [B, C, V'] written once; every row of skip, alpha and beta is read by the
    (usually 4) deep rows it takes from, which run close together and find it in the L2 cache. Rows
    of deep come from the caches. ``sums`` [B, row tiles * column_blocks, C] takes the sums for the
    gate, each element from one program.
    """
    DTYPE: tl.constexpr = skip_gate.dtype.element_ty
    BLOCK_V: tl.constexpr = TILE_ROWS * ROW_V
    BLOCK_J: tl.constexpr = TILE_ROWS * ROW_J
    # Columns fastest, then channels, then rows: programs next to each other read the same skip.
    program = tl.program_id(0)
    column_block = program % column_blocks
    program = program // column_blocks
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    c0 = program % channel_blocks * BLOCK_C
    program = program // channel_blocks
    programs = tl.cdiv(row_end - row_begin, TILE_ROWS)
    row_tile = program % programs
    first_row = row_begin + row_tile * TILE_ROWS
    sample = (program // programs).to(tl.int64)
    skip += sample * channels * voxels
    deep_voxels = deep_depth * deep_height * deep_width
    deep += sample * channels * deep_voxels
    grad_deep += sample * channels * deep_voxels
    cross += sample * ring * height * width
    radial += sample * ring * height * width
    channel, inside_channel = channels_of(c0, channels, BLOCK_C, EVEN_C)

    lane_v = tl.arange(0, BLOCK_V)
    lane_j = tl.arange(0, BLOCK_J)
    column = column_block * (ROW_J - 2) - 1 if HALO else 0
    j = column + lane_j % ROW_J
    j_exists = (j >= 0) & (j < deep_width)
    # The deep row of each lane, or one for all.
    if TILE_ROWS > 1:
        row_v = first_row + lane_v // ROW_V
        row_j = first_row + lane_j // ROW_J
        j_exists = j_exists & (row_j < row_end)
    else:
        row_v = first_row
        row_j = first_row
    z_v = row_v // deep_height
    y_v = row_v - z_v * deep_height
    z_run = first_touched(z_v, depth, deep_depth, WIDE)
    y_run = first_touched(y_v, height, deep_height, WIDE)
    x_run = first_touched(j, width, deep_width, WIDE)
    x_end = last_touched(tl.minimum(column + ROW_J, deep_width) - 1, width, deep_width, WIDE)
    if HALO:
        x_begin = first_touched(tl.maximum(column, 0), width, deep_width, WIDE) // 16 * 16
    else:
        x_begin = 0

    gradient = tl.zeros([BLOCK_C, BLOCK_J], DTYPE)
    # K of the neighbors in the plane before, in the own plane and in the one after.
    nothing = tl.zeros([BLOCK_J], DTYPE)
    before = (nothing,) * (3 * AROUND_Y)
    here = before
    after = before
    for x0 in range(x_begin, x_end, ROW_V):
        x = x0 + lane_v % ROW_V
        row_sum = tl.zeros([BLOCK_C, BLOCK_V], DTYPE)
        empty = (tl.zeros([BLOCK_V], DTYPE),) * AROUND_Y
        before_sums = empty
        here_sums = empty
        after_sums = empty
        for turn_z in range(0, longest_z):
            z = z_run + turn_z
            distance_z = distance(z, z_v, depth, deep_depth, WIDE, DTYPE)
            weight_z = tl.maximum(1 - tl.abs(distance_z), 0)
            plane_sums = empty
            for turn_y in range(0, longest_y):
                y = y_run + turn_y
                distance_y = distance(y, y_v, height, deep_height, WIDE, DTYPE)
                weight_y = tl.maximum(1 - tl.abs(distance_y), 0)
                inside = x < tl.where((y < height) & (z < depth), width, 0)
                at = offsets(
                    channel, (z * height + y) * width + x, channels, voxels, CHANNELS_LAST, WIDE
                )
                mask = inside_channel[:, None] & inside[None, :]
                value = tl.load(skip + at, mask=mask, other=0.0).to(DTYPE)
                at_factor = (z % ring * height + y) * width + x
                alpha = tl.load(cross + at_factor, mask=inside, other=0.0)
                beta = tl.load(radial + at_factor, mask=inside, other=0.0)
                row_sum += value * (weight_z * weight_y * alpha)[None, :]
                plane_sums = add_row(plane_sums, beta * weight_y, distance_y, weight_y, AROUND_Y)
            if AROUND_Z == 3:
                before_weight = weight_z * tl.maximum(-distance_z, 0)
                before_sums = add_plane(before_sums, plane_sums, before_weight, AROUND_Y)
                after_weight = weight_z * tl.maximum(distance_z, 0)
                after_sums = add_plane(after_sums, plane_sums, after_weight, AROUND_Y)
            here_sums = add_plane(here_sums, plane_sums, weight_z * weight_z, AROUND_Y)
        for turn_x in range(0, longest_x):
            at_x = x_run + turn_x
            distance_x = distance(at_x, j, width, deep_width, WIDE, DTYPE)
            taken = j_exists & (at_x >= x0) & (at_x < tl.minimum(x0 + ROW_V, width))
            weight = tl.where(taken, tl.maximum(1 - tl.abs(distance_x), 0), 0)
            index = tl.where(taken, at_x - x0, 0).to(tl.int32) + lane_j // ROW_J * ROW_V
            taken_rows = tl.broadcast_to(index[None, :], [BLOCK_C, BLOCK_J])
            gradient += tl.gather(row_sum, taken_rows, axis=1) * weight[None, :]
            left = weight * tl.maximum(-distance_x, 0)
            middle = weight * weight
            right = weight * tl.maximum(distance_x, 0)
            if AROUND_Z == 3:
                before = add_columns(before, before_sums, index, left, middle, right, AROUND_Y)
                after = add_columns(after, after_sums, index, left, middle, right, AROUND_Y)
            here = add_columns(here, here_sums, index, left, middle, right, AROUND_Y)

    z_j = row_j // deep_height
    y_j = row_j - z_j * deep_height
    from_left = tl.zeros([BLOCK_C, BLOCK_J], DTYPE)
    from_right = from_left
    from_middle = from_left
    for i in tl.static_range(AROUND_Z):
        near = here if AROUND_Z == 1 or i == 1 else (before if i == 0 else after)
        for k in tl.static_range(AROUND_Y):
            z = z_j + (i - AROUND_Z // 2)
            y = y_j + (k - AROUND_Y // 2)
            exists = (z >= 0) & (z < deep_depth) & (y >= 0) & (y < deep_height)
            exists = j_exists & (j < tl.where(exists, deep_width, 0))
            at = (z * deep_height + y) * deep_width + j
            at = offsets(channel, at, channels, deep_voxels, CHANNELS_LAST, WIDE)
            mask = inside_channel[:, None] & exists[None, :]
            value = tl.load(deep + at, mask=mask, other=0.0).to(DTYPE)
            # What a deep voxel gives to the one on its left, to its own column, and to the right.
            from_right += value * near[3 * k][None, :]
            from_middle += value * near[3 * k + 1][None, :]
            from_left += value * near[3 * k + 2][None, :]
    shape: tl.constexpr = [BLOCK_C, BLOCK_J]
    has_left = (j > 0) & (lane_j > 0)
    has_right = (j < deep_width - 1) & (lane_j < BLOCK_J - 1)
    index = tl.where(has_left, lane_j - 1, 0)[None, :]
    moved = tl.gather(from_left, tl.broadcast_to(index, shape), axis=1)
    from_middle += tl.where(has_left[None, :], moved, 0)
    index = tl.where(has_right, lane_j + 1, 0)[None, :]
    moved = tl.gather(from_right, tl.broadcast_to(index, shape), axis=1)
    from_middle += tl.where(has_right[None, :], moved, 0)

    own_gate = tl.load(skip_gate + sample * channels + channel, mask=inside_channel, other=0.0)
    up_gate = tl.load(deep_gate + sample * channels + channel, mask=inside_channel, other=0.0)
    gradient = gradient * own_gate[:, None] - from_middle * up_gate[:, None]
    if HALO:
        j_exists = j_exists & (lane_j > 0) & (lane_j < ROW_J - 1)
    at = offsets(channel, row_j * deep_width + j, channels, deep_voxels, CHANNELS_LAST, WIDE)
    mask = inside_channel[:, None] & j_exists[None, :]
    if WANTS_DEEP:
        tl.store(grad_deep + at, gradient * up_gate[:, None], mask=mask)
    if WANTS_DEEP_GATE:
        value = tl.load(deep + at, mask=mask, other=0.0).to(DTYPE)
        total = tl.sum(tl.where(mask, gradient * value, 0), axis=1)
        slot = (sample * all_row_tiles + done + row_tile) * column_blocks + column_block
        tl.store(sums + slot * channels + channel, total, mask=inside_channel)

# SPDX-License-Identifier: Apache-2.0
"""What the kernels of ``gcu`` share: positions, tiles of voxels, and the upsampled tile.

All kernels see volumes [B, C, D, H, W]; an image [B, C, H, W] is a volume of height 1, so that its
rows are planes and the work can be cut along them. Data is dense: a channel of a voxel lies at
``voxel * C + channel`` channels-last, and else at ``channel * V + voxel``. Sums are taken in the
dtype of the gates. Sizes travel as tuples: ``space`` (D, H, W), ``deep_space`` (D', H', W').
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse(size, DTYPE: tl.constexpr):
    """1 / (2 * size), which does not change in loops, where a division would be made anew."""
    return tl.full([], 0.5, DTYPE) / size


@triton.jit
def position(index, size, deep_size, LONG: tl.constexpr, DTYPE: tl.constexpr):
    """The two deep indices around ``index``, and how far it is from the first to the second.

    The position max(0, (index + 0.5) * deep_size / size - 0.5) is a fraction of integers over
    2 * size, so floor and fraction are exact. In float32 it would be off by 1e-5 voxels.
    """
    if LONG:
        index = index.to(tl.int64)
    numerator = tl.maximum((2 * index + 1) * deep_size - size, 0)
    low = numerator // (2 * size)
    fraction = (numerator - low * (2 * size)).to(DTYPE) * inverse(size, DTYPE)
    return low, tl.minimum(low + 1, deep_size - 1), fraction


@triton.jit
def distance(index, deep_index, size, deep_size, LONG: tl.constexpr, DTYPE: tl.constexpr):
    """How far the position of voxel ``index`` is past ``deep_index``, in deep voxels.

    The weight of the deep voxel there is max(0, 1 - |distance|).
    """
    if LONG:
        index = index.to(tl.int64)
    numerator = tl.maximum((2 * index + 1) * deep_size - size, 0)
    numerator = tl.minimum(numerator, 2 * size * (deep_size - 1))
    return (numerator - 2 * size * deep_index).to(DTYPE) * inverse(size, DTYPE)


@triton.jit
def first_touched(deep_index, size, deep_size, LONG: tl.constexpr):
    """The first voxel along an axis that takes from deep voxels >= ``deep_index``."""
    if LONG:
        deep_index = deep_index.to(tl.int64)
    numerator = (2 * deep_index - 1) * size - deep_size
    return tl.where(numerator < 0, 0, tl.maximum(numerator, 0) // (2 * deep_size) + 1)


@triton.jit
def last_touched(deep_index, size, deep_size, LONG: tl.constexpr):
    """One past the last voxel along an axis that takes from deep voxels <= ``deep_index``."""
    if LONG:
        deep_index = deep_index.to(tl.int64)
    numerator = tl.maximum((2 * deep_index + 3) * size - deep_size, 0)
    end = (numerator + 2 * deep_size - 1) // (2 * deep_size)
    return tl.where(deep_index >= deep_size - 1, size, tl.minimum(end, size))


@triton.jit
def offsets(channel, voxel, channels, voxels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of [channel, voxel] in one sample."""
    if WIDE:
        channel = channel.to(tl.int64)
        voxel = voxel.to(tl.int64)
    if CHANNELS_LAST:
        return channel[:, None] + voxel[None, :] * channels
    else:
        return channel[:, None] * voxels + voxel[None, :]


@triton.jit
def channels_of(c0, channels, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr):
    """Channels [c0, c0 + BLOCK_C), and which of them there are."""
    channel = c0 + tl.arange(0, BLOCK_C)
    exists = channel < channels
    if EVEN_C:
        exists = tl.full([BLOCK_C], 1, tl.int1)
    return channel, exists


@triton.jit
def tile_of(
    unit,
    column,
    begin,
    end,
    space,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The voxels of a tile in planes [begin, end).

    With ``ROWS`` it is block ``column`` of row ``unit``, else run ``unit`` in row-major order.
    Returns the tile's first voxel, the coordinates z, y and x (scalars z and y with ``ROWS``), the
    first x (with ``ROWS``), and which voxels there are.
    """
    _, height, width = space
    lane = tl.arange(0, BLOCK_V)
    if WIDE:
        unit = unit.to(tl.int64)
    if ROWS:
        first_x = column * BLOCK_V
        plane = unit // height
        z = begin + plane
        y = unit - plane * height
        first = (z * height + y) * width + first_x
        x = first_x + lane
        inside = x < width
    else:
        first_x = 0
        first = begin * height * width + unit * BLOCK_V
        voxel = first + lane
        inside = voxel < end * height * width
        row = voxel // width
        x = voxel - row * width
        z = row // height
        y = row - z * height
    if EVEN_V:
        inside = tl.full([BLOCK_V], 1, tl.int1)
    return first, z, y, x, first_x, inside


@triton.jit
def columns_of(
    deep,
    column,
    z,
    y,
    exists,
    channel,
    channels,
    space,
    deep_space,
    TAPS_Z: tl.constexpr,
    TAPS_Y: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The deep rows around (z, y), blended: columns ``column`` of it, [BLOCK_C, columns].

    Contiguous data; ``exists`` [BLOCK_C, columns] says what there is.
    """
    depth, height, _ = space
    deep_depth, deep_height, deep_width = deep_space
    deep_voxels = deep_depth * deep_height * deep_width
    z0, z1, z_fraction = position(z, depth, deep_depth, WIDE, DTYPE)
    y0, y1, y_fraction = position(y, height, deep_height, WIDE, DTYPE)
    total = tl.zeros([channel.shape[0], column.shape[0]], DTYPE)
    for i in tl.static_range(TAPS_Z):
        for j in tl.static_range(TAPS_Y):
            row = (z0 if i == 0 else z1) * deep_height + (y0 if j == 0 else y1)
            at = offsets(channel, row * deep_width + column, channels, deep_voxels, False, WIDE)
            value = tl.load(deep + at, mask=exists, other=0.0).to(DTYPE)
            if TAPS_Z * TAPS_Y > 1:
                weight = (1 - z_fraction if i == 0 else z_fraction) if TAPS_Z == 2 else 1
                weight *= (1 - y_fraction if j == 0 else y_fraction) if TAPS_Y == 2 else 1
                value *= weight
            total += value
    return total


@triton.jit
def upsampled(
    deep,
    channel,
    inside_channel,
    voxel,
    channels,
    space,
    deep_space,
    BLOCK_X: tl.constexpr,
    ALONG_X: tl.constexpr,
    WHOLE: tl.constexpr,
    TAPS_Z: tl.constexpr,
    TAPS_Y: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``deep`` of one sample interpolated to a tile, [BLOCK_C, BLOCK_V], without its gate.

    ``voxel`` is what ``tile_of`` returns. ``TAPS_Z`` and ``TAPS_Y`` are 1 where the deep axis has
    one voxel, else 2. ``ALONG_X`` is

    - "taps": every element has its own taps. They are vector loads along channels where the data
      is channels-last.
    - "gather", for contiguous rows: the deep rows around (z, y) are blended into one,
      [BLOCK_C, BLOCK_X], with contiguous loads, and that one is interpolated by two gathers.
    - "doubled", for contiguous rows of twice the size of the deep row: likewise, but one gather for
      two voxels: voxels 2k and 2k + 1 take from column k and from the one before or after it.
      ``WHOLE``: the tile is the whole row, so that no column before or after is needed.

    A NaN reaches the voxels that it is a tap of, and no others.
    """
    _, z, y, x, first_x, inside = voxel
    depth, height, width = space
    deep_depth, deep_height, deep_width = deep_space
    if ALONG_X == "doubled":
        lane = tl.arange(0, BLOCK_X)
        start = first_x // 2
        column = start + lane
        exists = inside_channel[:, None] & (column < deep_width)[None, :]
        here = columns_of(
            deep,
            column,
            z,
            y,
            exists,
            channel,
            channels,
            space,
            deep_space,
            TAPS_Z,
            TAPS_Y,
            WIDE,
            DTYPE,
        )
        shape: tl.constexpr = here.shape
        index = tl.maximum(lane - 1, 0)[None, :]
        before = tl.gather(here, tl.broadcast_to(index, shape), axis=1)
        # The last column is its own neighbor; lanes past it are masked later.
        index = tl.minimum(lane + 1, tl.minimum(deep_width - 1 - start, BLOCK_X - 1))[None, :]
        after = tl.gather(here, tl.broadcast_to(index, shape), axis=1)
        if not WHOLE:
            # One column on either side, that of the tile itself where there is none.
            side = tl.arange(0, 2)
            column = tl.where(side == 0, tl.maximum(start - 1, 0), start + BLOCK_X)
            column = tl.minimum(column, deep_width - 1)
            outer = columns_of(
                deep,
                column,
                z,
                y,
                tl.broadcast_to(inside_channel[:, None], [channel.shape[0], 2]),
                channel,
                channels,
                space,
                deep_space,
                TAPS_Z,
                TAPS_Y,
                WIDE,
                DTYPE,
            )
            first_column, last_column = tl.split(outer)
            before = tl.where(lane[None, :] == 0, first_column[:, None], before)
            after = tl.where(lane[None, :] == BLOCK_X - 1, last_column[:, None], after)
        even = before + 0.75 * (here - before)
        odd = here + 0.25 * (after - here)
        return tl.interleave(even, odd)
    elif ALONG_X == "gather":
        x0, x1, x_fraction = position(x, width, deep_width, WIDE, DTYPE)
        # Aligned down, so that the loads are vectors where rows are aligned.
        start, _, _ = position(first_x, width, deep_width, WIDE, DTYPE)
        start = start // 16 * 16
        column = start + tl.arange(0, BLOCK_X)
        exists = inside_channel[:, None] & (column < deep_width)[None, :]
        here = columns_of(
            deep,
            column,
            z,
            y,
            exists,
            channel,
            channels,
            space,
            deep_space,
            TAPS_Z,
            TAPS_Y,
            WIDE,
            DTYPE,
        )
        # Voxels past the end of the row are masked later, and read any column.
        low = tl.minimum((x0 - start).to(tl.int32), BLOCK_X - 1)[None, :]
        high = tl.minimum((x1 - start).to(tl.int32), BLOCK_X - 1)[None, :]
        out_shape: tl.constexpr = [channel.shape[0], x.shape[0]]
        left = tl.gather(here, tl.broadcast_to(low, out_shape), axis=1)
        right = tl.gather(here, tl.broadcast_to(high, out_shape), axis=1)
        return left + x_fraction[None, :] * (right - left)
    else:
        x0, x1, x_fraction = position(x, width, deep_width, WIDE, DTYPE)
        z0, z1, z_fraction = position(z, depth, deep_depth, WIDE, DTYPE)
        y0, y1, y_fraction = position(y, height, deep_height, WIDE, DTYPE)
        deep_voxels = deep_depth * deep_height * deep_width
        step = (x1 - x0) * (channels if CHANNELS_LAST else 1)
        mask = inside_channel[:, None] & inside[None, :]
        total = tl.zeros([channel.shape[0], x.shape[0]], DTYPE)
        for i in tl.static_range(TAPS_Z):
            for j in tl.static_range(TAPS_Y):
                row = (z0 if i == 0 else z1) * deep_height + (y0 if j == 0 else y1)
                low = row * deep_width + x0
                at = offsets(channel, low, channels, deep_voxels, CHANNELS_LAST, WIDE)
                left = tl.load(deep + at, mask=mask, other=0.0).to(DTYPE)
                right = tl.load(deep + (at + step[None, :]), mask=mask, other=0.0).to(DTYPE)
                # The weight of the row; 1 for a volume of one row. [BLOCK_V] in either case.
                weight = x_fraction * 0 + 1
                if TAPS_Z == 2:
                    weight *= 1 - z_fraction if i == 0 else z_fraction
                if TAPS_Y == 2:
                    weight *= 1 - y_fraction if j == 0 else y_fraction
                total += left * (weight * (1 - x_fraction))[None, :]
                total += right * (weight * x_fraction)[None, :]
        return total


@triton.jit
def block_of(
    skip,
    deep,
    skip_gate,
    deep_gate,
    c0,
    voxel,
    channels,
    space,
    deep_space,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    ALONG_X: tl.constexpr,
    WHOLE: tl.constexpr,
    TAPS_Z: tl.constexpr,
    TAPS_Y: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Channels [c0, c0 + BLOCK_C) of a tile: offsets, mask, skip, gated skip, and gated up.

    Pointers are those of one sample. The gates are [C], and 0 where there is no channel.
    """
    DTYPE: tl.constexpr = skip_gate.dtype.element_ty
    depth, height, width = space
    first, _, _, x, _, inside = voxel
    channel, inside_channel = channels_of(c0, channels, BLOCK_C, EVEN_C)
    flat = first + tl.arange(0, x.shape[0])
    at = offsets(channel, flat, channels, depth * height * width, CHANNELS_LAST, WIDE)
    mask = inside_channel[:, None] & inside[None, :]
    value = tl.load(skip + at, mask=mask, other=0.0).to(DTYPE)
    up = upsampled(
        deep,
        channel,
        inside_channel,
        voxel,
        channels,
        space,
        deep_space,
        BLOCK_X,
        ALONG_X,
        WHOLE,
        TAPS_Z,
        TAPS_Y,
        CHANNELS_LAST,
        WIDE,
        DTYPE,
    )
    own_gate = tl.load(skip_gate + channel, mask=inside_channel, other=0.0)[:, None]
    up_gate = tl.load(deep_gate + channel, mask=inside_channel, other=0.0)[:, None]
    return at, mask, value, value * own_gate, up * up_gate


@triton.jit
def inverse_norm(squares, EPS: tl.constexpr):
    """1 / max(norm, EPS) from the sum of squares."""
    return 1 / tl.maximum(tl.sqrt(squares), EPS)

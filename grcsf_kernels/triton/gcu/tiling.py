# SPDX-License-Identifier: Apache-2.0
"""How the kernels of ``gcu`` over voxels cut a volume into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grcsf_kernels.triton import launch

# Programs that are enough for any device: beyond, each takes several tiles, for fewer partial sums
# and less arithmetic of indices.
_MANY_PROGRAMS = 4096
_TILES = 4

# Rows shorter than this waste lanes of a tile that holds one row.
_SHORTEST_ROW = 32

# Where a tile could hold more rows than this, because channels are few, it is no single row either.
_MOST_ROWS = 8


def volume(tensor: Tensor) -> Tensor:
    """An image [B, C, H, W] as a volume [B, C, H, 1, W], without a copy; volumes stay."""
    return tensor.unsqueeze(3) if tensor.ndim == 4 else tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a voxel are neighbors.

    Read off the last stride, which is 1 only in contiguous data (or where C = 1 and both are the
    same): the operator's check gives axes of size 1 the strides of their layout.
    """
    return tensor.stride(-1) != 1


@dataclass(frozen=True)
class Tiling:
    """How a kernel over voxels cuts a sample into tiles of BLOCK_V voxels and BLOCK_C channels.

    Attributes:
        row: size of a row that tiles lie in, or 0 where a tile is any run of voxels.
        plane: voxels in a plane.
        columns: tiles in a row; 1 for runs.
        constants: compile-time constants of the kernel. A program takes TILES rows or runs.
    """

    row: int
    plane: int
    columns: int
    constants: dict[str, Any]

    def units(self, planes: int) -> int:
        """Rows, or runs, in so many planes."""
        return launch.blocks(planes * self.plane, self.row or self.constants["BLOCK_V"])

    def programs(self, planes: int) -> int:
        """Programs for so many planes of one sample."""
        return launch.blocks(self.units(planes), self.constants["TILES"]) * self.columns


def tiling(kernel: str, skip: Tensor, deep: Tensor) -> Tiling:
    """The tiles of ``kernel`` ("forward" or "voxels") for volumes ``skip`` and ``deep``.

    A tile has TILE elements of all channels, or of BLOCK_C where they are more. Where rows are
    long, it lies in one row: z and y are the same for all of its voxels, and x is for all rows of a
    program. If the data is contiguous, the deep row is loaded as a row, see ``upsampled``. The
    table's shape classes are "doubled" and "rows" for these, "runs" for contiguous data with short
    rows, and "channels_last".
    """
    batch, channels, depth, height, width = skip.shape
    deep_width = deep.shape[4]
    is_contiguous = not is_channels_last(skip)
    for rows in (width >= _SHORTEST_ROW, False):
        if is_contiguous:
            shape = ("doubled" if width == 2 * deep_width else "rows") if rows else "runs"
        else:
            shape = "channels_last"
        constants = launch.parameters("gcu", kernel, skip, shape)
        most_channels, elements = constants.pop("BLOCK_C"), constants.pop("TILE")
        block_c = min(launch.power_of_2(channels), most_channels)
        block_v = elements // block_c
        if not rows or block_v <= _MOST_ROWS * width:
            break
    block_v = min(block_v, launch.power_of_2(width if rows else depth * height * width, 16))
    along_x, block_x = "taps", block_v
    if shape == "doubled":
        along_x, block_x = "doubled", block_v // 2
    elif shape == "rows":
        # Columns from the first tap of a tile to its last: its length, rounding at both ends, and
        # up to 15 more in front for alignment.
        span = min(deep_width, (block_v - 1) * deep_width // width + 3 + 15)
        if span <= block_v:
            along_x, block_x = "gather", launch.power_of_2(span)
    tiles = Tiling(
        row=width if rows else 0,
        plane=height * width,
        columns=launch.blocks(width, block_v) if rows else 1,
        constants=constants
        | {
            "BLOCK_C": block_c,
            "BLOCK_V": block_v,
            "BLOCK_X": block_x,
            "ALONG_X": along_x,
            "ROWS": rows,
            "TILES": 1,
            "ONE_BLOCK": channels <= block_c,
            "WHOLE": width <= block_v,
            "TAPS_Z": min(deep.shape[2], 2),
            "TAPS_Y": min(deep.shape[3], 2),
            "CHANNELS_LAST": not is_contiguous,
            "EVEN_C": channels % block_c == 0,
            "EVEN_V": (width if rows else depth * height * width) % block_v == 0,
            "WIDE": is_wide(skip, deep),
        },
    )
    if batch * tiles.programs(depth) > _MANY_PROGRAMS:
        tiles.constants["TILES"] = _TILES
    return tiles


def is_wide(skip: Tensor, deep: Tensor) -> bool:
    """Whether offsets in a tensor, or numerators of positions, need 64 bits."""
    largest = max(s * d for s, d in zip(skip.shape[2:], deep.shape[2:], strict=True))
    longest = max(max(skip.shape[2:]), max(deep.shape[2:]))
    return launch.wide(skip, deep) or 2 * (largest + longest) + longest >= 2**31


def sizes(skip: Tensor, deep: Tensor) -> tuple[int, ...]:
    """What kernels take as sizes: C, D, H, W, V, D', H', W'."""
    return (*skip.shape[1:], skip.shape[2:].numel(), *deep.shape[2:])

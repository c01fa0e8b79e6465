# SPDX-License-Identifier: Apache-2.0
"""What the direct kernels of ``rcu`` share: patches, tiles of voxels, and one head's attention.

*Patches.* A patch is numbered (sample, z, y, x), its voxels by its full size, also where the edge
of the volume cuts it: what does not exist is masked. So one division by the patch's size finds a
voxel, and it becomes shifts where the size is a power of two (PATCH_Y and PATCH_X, 0 where they
come at run time: a volume that is one patch must not be compiled anew for each size). Nothing is
masked where no edge cuts a patch and blocks fit into it (EVEN): loads are wide then, and logits
taken as they are.

*Lanes.* The c channels of a map lie in LANES >= c lanes, at least the 16 that tensor cores take.
The lanes beyond c hold 0 in queries and keys alike.

*Center.* Softmax does not see a constant that is added to all keys, so keys are taken about the
mean of their patch. Logits are then smaller, and no sum over keys has a mean to cancel.

*Channels.* Where C is more than BLOCK_C the output's channels are cut into groups, one a program,
and each group attends anew. Otherwise a program would hold the sums of all channels, or the
expectations of all heads (LANES numbers a head and voxel), in registers that it does not have, or
in memory, half as much as x. Networks have many channels where they have few voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from grcsf_kernels.triton.launch import blocks, parameters, power_of_2, precision, wide
from grcsf_kernels.triton.primitives import compute, dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Below every logit: what a maximum over no keys is. Finite, so that its differences are.
LOWEST = tl.constexpr(-1e38)

# Patch sizes up to this are compiled in where they are powers of two.
_LARGEST_COMPILED = 64


# Keys, or queries, whose sums begin anew: a multiple of every block.
_SEGMENT = 4096


@dataclass(frozen=True)
class Geometry:
    """The patches of a volume, three axes.

    Attributes:
        batch: number of samples.
        channels: C of x.
        sizes: (D, H, W); D = 1 for an image.
        patch: voxels of a patch along each axis.
        strides: of x: sample, channel, z, y, x.
    """

    batch: int
    channels: int
    sizes: tuple[int, ...]
    patch: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(blocks(s, p) for s, p in zip(self.sizes, self.patch, strict=True))

    @property
    def patches(self) -> int:
        """All patches, of all samples."""
        return self.batch * prod(self.grid)

    @property
    def whole(self) -> bool:
        """Whether no edge of the volume cuts a patch."""
        return all(size % own == 0 for size, own in zip(self.sizes, self.patch, strict=True))

    @property
    def voxels(self) -> int:
        """Voxels of a patch that no edge cuts."""
        return prod(self.patch)

    def runtime(self) -> tuple[int, ...]:
        """What kernels take at run time, in their order."""
        return (*self.strides, self.channels, *self.sizes, *self.patch)

    def constants(self, *block_sizes: int) -> dict[str, Any]:
        """PATCH_Y, PATCH_X and EVEN, for kernels that take voxels in blocks of these sizes."""
        _, y, x = self.patch
        fixed = all(own & (own - 1) == 0 and own <= _LARGEST_COMPILED for own in (y, x))
        return {
            "PATCH_Y": y if fixed else 0,
            "PATCH_X": x if fixed else 0,
            "EVEN": self.whole and all(self.voxels % block == 0 for block in block_sizes),
        }


def geometry(x: Tensor, patch: Sequence[int]) -> Geometry:
    """The geometry of x [B, C, *S] with a patch size per axis of S."""
    volume = x.unsqueeze(2) if x.ndim == 4 else x
    batch, channels, *sizes = volume.shape
    padded = (1,) * (3 - len(patch)) + tuple(patch)
    return Geometry(batch, channels, tuple(sizes), padded, tuple(volume.stride()))


def tiles(
    kernel: str, own: Geometry, x: Tensor, residual: Tensor, map_channels: int
) -> dict[str, Any]:
    """Constants of an attention kernel: its row of the table, cut to what there is.

    The shape class is the number of lanes: ``c16``, ``c32``, or any. Small patches take smaller
    tiles and fewer warps.
    """
    single = precision(x)
    lanes = power_of_2(map_channels, 1 if single == "float64" else 16)
    own_tiles: dict[str, Any] = parameters("rcu_direct", kernel, x, f"c{max(lanes, 16)}")
    padded = power_of_2(own.voxels, 16)
    full = own_tiles["BLOCK_Q"] * own_tiles["BLOCK_K"]
    for name in ("BLOCK_Q", "BLOCK_K"):
        own_tiles[name] = min(own_tiles[name], padded)
    for name in ("BLOCK_R", "BLOCK_C"):
        if name in own_tiles:
            own_tiles[name] = min(own_tiles[name], power_of_2(own.channels, 16))
    smaller = full // (own_tiles["BLOCK_Q"] * own_tiles["BLOCK_K"])
    own_tiles["num_warps"] = max(2, own_tiles["num_warps"] // smaller)
    return {
        **own_tiles,
        **own.constants(own_tiles["BLOCK_Q"], own_tiles["BLOCK_K"]),
        "LANES": lanes,
        "SEGMENT": max(_SEGMENT, own_tiles["BLOCK_K"], own_tiles["BLOCK_Q"]),
        "WIDE": wide(x, residual),
        "PRECISION": single,
    }


@triton.jit
def patch_box(patch, depth, height, width, patch_z, patch_y, patch_x):
    """Sample, first voxel (z, y, x), and existing voxels (z, y, x) of a patch."""
    across = tl.cdiv(width, patch_x)
    down = tl.cdiv(height, patch_y)
    deep = tl.cdiv(depth, patch_z)
    x = patch % across * patch_x
    y = patch // across % down * patch_y
    z = patch // across // down
    sample = z // deep
    z = z % deep * patch_z
    size_z = tl.minimum(patch_z, depth - z)
    size_y = tl.minimum(patch_y, height - y)
    size_x = tl.minimum(patch_x, width - x)
    return sample, z, y, x, size_z, size_y, size_x


@triton.jit
def corners(place, strides, depth, height, width):
    """64-bit offsets of a patch's first voxel: in x, and in one map's plane of the residual."""
    sample, z, y, x, _size_z, _size_y, _size_x = place
    stride_b, _stride_c, stride_z, stride_y, stride_x = strides
    own = sample.to(tl.int64) * stride_b + z.to(tl.int64) * stride_z
    own += y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return own, (z.to(tl.int64) * height + y) * width + x


@triton.jit
def positions(
    voxel,
    place,
    patch_y,
    patch_x,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(z, y, x) of voxels inside their patch, and which of them exist."""
    _sample, _z, _y, _x, size_z, size_y, size_x = place
    if WIDE:
        voxel = voxel.to(tl.int64)
    if PATCH_X > 0:
        x = voxel % PATCH_X
        row = voxel // PATCH_X
        y = row % PATCH_Y
        z = row // PATCH_Y
    else:
        row = voxel // patch_x
        x = voxel - row * patch_x
        z = row // patch_y
        y = row - z * patch_y
    if EVEN:
        exists = tl.full(voxel.shape, True, tl.int1)
    else:
        exists = (z < size_z) & (y < size_y) & (x < size_x)
    return z, y, x, exists


@triton.jit
def voxel_offsets(
    voxel,
    place,
    strides,
    patch_y,
    patch_x,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets in x of voxels from their patch's first one, and which of them exist."""
    _stride_b, _stride_c, stride_z, stride_y, stride_x = strides
    z, y, x, exists = positions(voxel, place, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE)
    return z * stride_z + y * stride_y + x * stride_x, exists


@triton.jit
def load_center(means, patch, channels, maps, map_channels, k, LANES: tl.constexpr):
    """Means [LANES] of map k in a patch, from ``means`` [patches, C + K * c]."""
    lane = tl.arange(0, LANES)
    row = means + patch.to(tl.int64) * (channels + maps * map_channels)
    return tl.load(row + channels + k * map_channels + lane, mask=lane < map_channels, other=0)


@triton.jit
def load_keys(
    plane,
    first,
    center,
    place,
    frame,
    map_channels,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [BLOCK_K, LANES] about their center, from voxel ``first`` on, and which exist.

    ``plane`` points to the patch's first voxel in the first channel of its map.
    """
    height, width, volume, patch_y, patch_x = frame
    lane = tl.arange(0, LANES)
    voxel = first + tl.arange(0, BLOCK_K)
    z, y, x, exists = positions(voxel, place, patch_y, patch_x, PATCH_Y, PATCH_X, EVEN, WIDE)
    offset = (z * height + y) * width + x
    lane_offset = lane.to(tl.int64) * volume if WIDE else lane * volume.to(tl.int32)
    keys = tl.load(
        plane + offset[:, None] + lane_offset[None, :],
        mask=exists[:, None] & (lane < map_channels)[None, :],
        other=0,
    )
    return compute(keys, PRECISION) - center[None, :], exists


@triton.jit
def nearest(value, PRECISION: tl.constexpr):
    """``value`` rounded to the nearest TF32 number where products take that: they would cut it off.

    Cutting off makes everything smaller by 2^-12 on average, which no sum averages out.
    """
    if PRECISION == "tf32":
        short = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        value += value - short
        value = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return value


@triton.jit
def narrow(value, like):
    """``value`` in the dtype that ``like`` points to, rounded to the nearest.

    Triton's interpreter cuts bfloat16 off instead, and what is written twice would show it.
    """
    if like.dtype.element_ty == tl.bfloat16:
        known = value == value
        bits = tl.where(known, value.to(tl.int32, bitcast=True), 0)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(known, bits.to(tl.float32, bitcast=True), value)
    return value.to(like.dtype.element_ty)


@triton.jit
def project(
    data,
    offset,
    exists,
    stride_c,
    channels,
    weight,
    weight_stride_c,
    weight_stride_lane,
    map_channels,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """data [voxels, C] times a head's weight [C, c], taken BLOCK_R channels at a time."""
    lane = tl.arange(0, LANES)
    dtype: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    found = tl.zeros((offset.shape[0], LANES), dtype)
    for first in range(0, channels, BLOCK_R):
        channel = first + tl.arange(0, BLOCK_R)
        own = tl.load(
            weight + channel[:, None] * weight_stride_c + lane[None, :] * weight_stride_lane,
            mask=(channel < channels)[:, None] & (lane < map_channels)[None, :],
            other=0,
        )
        tile = load_tile(data, offset, exists, first, stride_c, channels, BLOCK_R, WIDE)
        found += dot(compute(tile, PRECISION), nearest(own, PRECISION), PRECISION)
    return found


@triton.jit
def tile_offsets(offset, first, stride_c, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [voxels, BLOCK_C] of channels ``first`` and on."""
    channel = first + tl.arange(0, BLOCK_C)
    if WIDE:
        channel = channel.to(tl.int64)
    return offset[:, None] + (channel * stride_c)[None, :]


@triton.jit
def load_tile(
    data,
    offset,
    exists,
    first,
    stride_c,
    channels,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Data [voxels, BLOCK_C] of channels ``first`` and on, 0 where there is none."""
    mask = exists[:, None] & (first + tl.arange(0, BLOCK_C) < channels)[None, :]
    return tl.load(data + tile_offsets(offset, first, stride_c, BLOCK_C, WIDE), mask=mask, other=0)


@triton.jit
def expectation(
    a,
    plane,
    center,
    voxels,
    place,
    frame,
    map_channels,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head's attention of queries a [BLOCK_Q, LANES], in units of log2.

    Online softmax over blocks of keys. Sums start anew every SEGMENT keys, so that no running sum
    has more than a few hundred terms, whatever the size of the patch.

    Returns:
        The largest logit [BLOCK_Q] (log2), the sum of weights over it [BLOCK_Q], and the
        expectation [BLOCK_Q, LANES] of the keys about their center.
    """
    BLOCK_Q: tl.constexpr = a.shape[0]
    LANES: tl.constexpr = a.shape[1]
    dtype: tl.constexpr = a.dtype
    top = tl.full((BLOCK_Q,), LOWEST, dtype)
    total = tl.zeros((BLOCK_Q,), dtype)
    mean = tl.zeros((BLOCK_Q, LANES), dtype)
    for segment in range(0, voxels, SEGMENT):
        own_top = tl.full((BLOCK_Q,), LOWEST, dtype)
        own_total = tl.zeros((BLOCK_Q,), dtype)
        own_mean = tl.zeros((BLOCK_Q, LANES), dtype)
        for first in range(segment, tl.minimum(segment + SEGMENT, voxels), BLOCK_K):
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
            logits = dot(a, tl.trans(keys), PRECISION)
            logits = tl.where(exists[None, :], logits, float("-inf"))
            new = tl.maximum(own_top, tl.max(logits, axis=1))
            weights = tl.exp2(logits - new[:, None])
            shrink = tl.exp2(own_top - new)
            own_total = own_total * shrink + tl.sum(weights, axis=1)
            own_mean = own_mean * shrink[:, None] + dot(weights, keys, PRECISION)
            own_top = new
        new = tl.maximum(top, own_top)
        shrink = tl.exp2(top - new)
        own_shrink = tl.exp2(own_top - new)
        total = total * shrink + own_total * own_shrink
        mean = mean * shrink[:, None] + own_mean * own_shrink[:, None]
        top = new
    return top, total, mean / total[:, None]

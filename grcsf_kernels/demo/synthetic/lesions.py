# SPDX-License-Identifier: Apache-2.0
"""Lesions: connected blobs of a given volume, and how much of the signal they change."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from grcsf_kernels.demo.synthetic.anatomy import Array, Mask, smooth_field


def grow_lesion(
    rng: np.random.Generator, free: Mask, volume: float, spacing: NDArray[np.float64]
) -> Mask:
    """A connected blob of ``volume`` mm^3 (to the nearest voxel, at least one) within ``free``.

    It grows from a seed voxel, always by the neighbor that costs least; the cost is the distance
    from the seed in a random ellipsoid plus a smooth random field, so blobs are lobed and no two
    are alike, yet the volume is met exactly.
    """
    wanted = max(1, round(volume / float(np.prod(spacing))))
    regions, _ = ndimage.label(free)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    room = np.argwhere(regions == sizes.argmax())
    seed = room[rng.integers(len(room))]

    radius = (3 * volume / (4 * np.pi)) ** (1 / 3)
    stretch = np.exp(rng.uniform(-0.35, 0.35, 3))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    shape_matrix = turn / (stretch / np.cbrt(stretch.prod()))  # rotation, then one scale per axis
    reach = np.ceil(4 * radius / spacing).astype(int) + 2
    low = np.maximum(seed - reach, 0)
    box = tuple(slice(a, b) for a, b in zip(low, seed + reach + 1, strict=True))
    inside = free[box]
    offset = (np.indices(inside.shape) - (seed - low)[:, None, None, None]).astype(np.float32)
    millimetres = offset * spacing[:, None, None, None]
    distance = np.sqrt((np.tensordot(shape_matrix.T, millimetres, axes=1) ** 2).sum(0)) / radius
    cost = distance + 0.5 * smooth_field(rng, inside.shape, 14)

    grown = np.zeros_like(inside)
    queued = ~inside
    start = tuple(int(v) for v in seed - low)
    queued[start] = True
    front = [(0.0, start)]
    while front and wanted:
        _, voxel = heapq.heappop(front)
        grown[voxel] = True
        wanted -= 1
        for axis in range(3):
            for step in (-1, 1):
                near = (*voxel[:axis], voxel[axis] + step, *voxel[axis + 1 :])
                if 0 <= near[axis] < inside.shape[axis] and not queued[near]:
                    queued[near] = True
                    heapq.heappush(front, (float(cost[near]), near))
    lesion = np.zeros_like(free)
    lesion[box] = grown
    return lesion


def paint(
    rng: np.random.Generator,
    signal: Array,
    lesion: Mask,
    target: float,
    strengths: tuple[float, float],
) -> Array:
    """Pull the signal in ``lesion`` towards ``target``, never past it.

    Args:
        rng: of strength and texture.
        signal: [X, Y, Z], without noise.
        lesion: where.
        target: signal of the most pronounced lesion, such as that of fluid.
        strengths: weakest and strongest share of the way to ``target``; drawn once a lesion.
    """
    strength = rng.uniform(*strengths)
    edge = ndimage.gaussian_filter(lesion.astype(np.float32), 0.7)
    texture = 1 + 0.1 * smooth_field(rng, signal.shape, 12)
    weight = np.clip(strength * texture * (0.5 * lesion + 0.5 * edge), 0, 1)
    away = target - signal
    # The blurred edge reaches tissue that lies beyond the target already, such as fluid.
    downwards = away[lesion].mean() < 0
    return signal + weight * (np.minimum(away, 0) if downwards else np.maximum(away, 0))

# SPDX-License-Identifier: Apache-2.0
"""Heads that differ: the template under an affine and a smooth deformation, with its own fluid.

Coordinates are voxels of the 1 mm template until a head is sampled on the grid of its subject.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Intensities that the template's T1 image has in gray matter, white matter and fluid, by least
# squares over its brain (R^2 0.97), as shares of its maximum. What they leave is detail: deep
# nuclei, the cortex's own variation.
_TEMPLATE_INTENSITIES = (0.660, 0.879, 0.281)
_VENTRICLES_MM = (0.0, -15.0, 15.0)  # where the lateral ventricles are, MNI coordinates


@dataclass
class Head:
    """One head on the grid of its subject; arrays are [X, Y, Z].

    Attributes:
        gray: share of gray matter in each voxel.
        white: share of white matter; what is left of the brain is fluid.
        detail: of the T1 image beyond its tissues, in units of the template's maximum.
        brain: which voxels are brain or the fluid around it.
        spacing: mm, per axis.
        affine: voxel indices to mm.
    """

    gray: Array
    white: Array
    detail: Array
    brain: Mask
    spacing: NDArray[np.float64]
    affine: NDArray[np.float64]

    @property
    def fluid(self) -> Array:
        """Share of fluid in each voxel of the brain."""
        return np.where(self.brain, np.clip(1 - self.gray - self.white, 0, 1), 0)


@functools.cache
def _template(spacing: tuple[float, ...]) -> tuple[list[Array], NDArray[np.float64]]:
    """Gray, white, detail and brain, low-passed for sampling at ``spacing``, and the affine."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            "synthetic subjects need nilearn, which carries the template: "
            'pip install "grcsf-kernels[demo]"'
        ) from error
    image = datasets.load_mni152_template(resolution=1)
    files = (
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
        image,
        datasets.load_mni152_brain_mask(resolution=1),
    )
    gray, white, head, brain = (np.asarray(file.dataobj, np.float32) for file in files)
    gray, white = gray * brain, white * brain
    tissues = (gray, white, np.clip(brain - gray - white, 0, 1))
    known = sum(v * tissue for v, tissue in zip(_TEMPLATE_INTENSITIES, tissues, strict=True))
    detail = (head / head.max() - known) * brain
    # A voxel of s mm averages over s mm; beyond this blur the coarse grid would alias.
    sigma = 0.35 * np.sqrt(np.maximum(np.square(spacing) - 1, 0))
    maps = [ndimage.gaussian_filter(m, sigma) for m in (gray, white, detail, brain)]
    return maps, np.asarray(image.affine, np.float64)


def smooth_field(rng: np.random.Generator, shape: Sequence[int], waves: int) -> Array:
    """A random field of unit variance made of the ``waves`` lowest cosines of each axis."""
    index = np.indices((waves,) * 3).sum(0)
    field = rng.standard_normal((waves,) * 3) / (1 + index)
    field[0, 0, 0] = 0  # no constant part: a field has no say in the position or the gain
    for length in shape:
        basis = np.cos(np.pi * np.outer(np.arange(waves), np.arange(length) + 0.5) / length)
        field = np.tensordot(field, basis, axes=(0, 0))  # the new axis goes last: 3 turns restore
    return (field / field.std()).astype(np.float32)


def deformed_head(rng: np.random.Generator, spacing: NDArray[np.float64]) -> Head:
    """The template in a subject's own shape, on a grid of ``spacing`` mm.

    Turned by up to 4 degrees, scaled by up to 6 % an axis, bent by a field of 0.5 to 2.5 mm; the
    ventricles up to half as wide again or a little narrower; the cortex thinner or thicker.
    """
    maps, world = _template(tuple(float(s) for s in spacing))
    whole = maps[0].shape
    shape = tuple(int(n) for n in np.ceil(np.asarray(whole) / spacing))
    affine = world.copy()
    affine[:3, :3] = np.diag(spacing)
    affine[:3, 3] += (spacing - 1) / 2  # the outer faces of the two grids' first voxels meet

    angles = np.deg2rad(rng.uniform(-4, 4, 3))
    skew = np.array(
        [[0, -angles[2], angles[1]], [angles[2], 0, -angles[0]], [-angles[1], angles[0], 0]]
    )
    matrix = (np.eye(3) + skew) * rng.uniform(0.94, 1.06, 3)
    center = (np.asarray(whole) - 1) / 2
    # Where in the template (in its voxels, which are 1 mm) each voxel of the subject comes from.
    grid = (
        np.indices(shape, np.float32).reshape(3, -1) * spacing[:, None]
        + ((spacing - 1) / 2 - center)[:, None]
    )
    source = matrix @ grid + (center + rng.uniform(-2, 2, 3))[:, None]
    for axis in range(3):
        source[axis] += rng.uniform(0.5, 2.5) * smooth_field(rng, shape, 6).ravel()
    source = _widen(source, rng.uniform(-0.1, 0.35), rng.uniform(18, 28), world)

    source = source.reshape(3, *shape)
    gray, white, detail, brain = (
        ndimage.map_coordinates(m, source, order=1).astype(np.float32) for m in maps
    )
    inside = brain > 0.5
    # A thinner cortex leaves its place to fluid: sulci open.
    gray = np.where(inside, np.clip(gray, 0, 1) ** np.float32(rng.uniform(0.8, 1.8)), 0)
    white = np.where(inside, np.clip(white, 0, 1 - gray), 0)
    return Head(gray, white, np.where(inside, detail, 0), inside, spacing, affine)


def _widen(
    source: NDArray[np.float64], amount: float, reach: float, world: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Magnify by up to ``1 / (1 - amount)`` about the ventricles, fading out over ``reach`` mm."""
    origin = np.linalg.solve(world, [*_VENTRICLES_MM, 1.0])[:3, None]
    offset = source - origin
    fading = np.exp(-(offset**2).sum(0) / (2 * reach**2))
    return source - amount * offset * fading


def draw_tubes(
    rng: np.random.Generator,
    shape: Sequence[int],
    starts: NDArray[np.int64],
    spacing: NDArray[np.float64],
    radius_mm: tuple[float, float] = (0.6, 1.4),
    length_mm: tuple[float, float] = (20.0, 80.0),
) -> Array:
    """Share of each voxel [X, Y, Z] that winding tubes fill, one from each start [N, 3]."""
    filled = np.zeros(shape, np.float32)
    step = 0.5 * float(spacing.min())
    for start in starts:
        count = int(rng.uniform(*length_mm) / step)
        heading = rng.standard_normal(3)
        turns = rng.standard_normal((count, 3)) * 0.35 * np.sqrt(step)
        headings = heading + np.cumsum(turns, axis=0)
        headings /= np.linalg.norm(headings, axis=1, keepdims=True)
        path = np.rint(start + np.cumsum(headings * step, axis=0) / spacing).astype(int)
        path = path[((path >= 0) & (path < shape)).all(axis=1)]
        area = np.pi * rng.uniform(*radius_mm) ** 2
        np.add.at(filled, tuple(path.T), np.float32(area * step / spacing.prod()))
    return np.clip(ndimage.gaussian_filter(filled, 0.5), 0, 1)

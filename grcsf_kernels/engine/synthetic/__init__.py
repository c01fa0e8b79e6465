# SPDX-License-Identifier: Apache-2.0
"""Synthetic stroke: a real T1 template, made into different subjects, with lesions drawn into it.

The anatomy is the skull-stripped MNI152 T1 template in the space and size of ATLAS v2.0
(197x233x189 voxels of 1 mm), which comes inside the wheel of ``nilearn``: nothing is downloaded.
Each subject is the template under a small random affine and a smooth deformation, with its own
contrast, gain, bias field and noise. Lesions are connected random blobs of 10 to 50,000 mm^3,
anywhere in the tissue, darker than it by a factor that goes from plain to subtle.

What a network scores here says that it learns, not how it would do on patients.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from grcsf_kernels.engine.files import write_whole

LESION_VOLUME_MM3 = (10.0, 50_000.0)
TISSUE = 0.5  # of the template's maximum: above it grey and white matter, below it fluid
FLUID = 0.3  # what an old infarct turns into

_Array = NDArray[np.float32]
_Mask = NDArray[np.bool_]


def make_subject(
    seed: int | Sequence[int],
    spacing: float | Sequence[float] = 2.0,
    lesions: tuple[int, int] = (1, 3),
) -> tuple[_Array, NDArray[np.uint8], NDArray[np.float64]]:
    """One synthetic subject; the same seed gives the same subject.

    Anatomy, lesions and noise have random streams of their own: the same seed with
    ``lesions=(0, 0)`` is the same head, healthy.

    Args:
        seed: integer, or several, as ``numpy.random.default_rng`` takes them.
        spacing: voxel size in mm, one number or one per axis.
        lesions: fewest and most lesions, both included.

    Returns:
        The image (float32, zero outside the brain), the label (uint8, 1 in lesions) and the affine
        (float64 4x4, voxel indices to mm).

    Raises:
        ValueError: for a spacing that is not positive or a range of lesions that is none.
        ImportError: where nilearn is not installed.
    """
    size = _spacing(spacing)
    fewest, most = lesions
    if not 0 <= fewest <= most:
        raise ValueError(f"lesions must be (fewest, most) with 0 <= fewest <= most, got {lesions}")
    anatomy, pathology, scanner = np.random.default_rng(seed).spawn(3)

    head, brain, affine = _deformed_head(anatomy, size)
    label = np.zeros(head.shape, np.uint8)
    for _ in range(int(pathology.integers(fewest, most, endpoint=True))):
        low, high = np.log(LESION_VOLUME_MM3)
        volume = float(np.exp(pathology.uniform(low, high)))
        free = brain & (head > TISSUE) & ~ndimage.binary_dilation(label, np.ones((3, 3, 3)))
        lesion = _grow_lesion(pathology, free, volume, size)
        head = _darken(pathology, head, lesion)
        label[lesion] = 1
    return _scan(scanner, head, brain), label, affine


def make_dataset(
    folder: Path,
    count: int,
    seed: int = 0,
    spacing: float | Sequence[float] = 2.0,
    lesions: tuple[int, int] = (1, 3),
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``count`` subjects as ``subject<i>_image.nii.gz`` and ``subject<i>_label.nii.gz``.

    With ``lesions=(0, 0)`` the subjects are healthy and get no label file.

    Args:
        folder: made where it is missing.
        count: number of subjects.
        seed: of the data set; different seeds share no subject.
        spacing: voxel size in mm, one number or one per axis.
        lesions: fewest and most lesions of a subject, both included.
        progress: called with (subjects done, ``count``) after each.

    Returns:
        The images' paths.

    Raises:
        ValueError: as :func:`make_subject`, and for a negative ``count``.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for index in range(count):
        image, label, affine = make_subject((seed, index), spacing, lesions)
        images.append(folder / f"subject{index:03d}_image.nii.gz")
        _write(images[-1], image, affine)
        if lesions[1] > 0:
            _write(folder / f"subject{index:03d}_label.nii.gz", label, affine)
        if progress is not None:
            progress(index + 1, count)
    return images


def _spacing(spacing: float | Sequence[float]) -> NDArray[np.float64]:
    size = np.broadcast_to(np.asarray(spacing, float), 3)
    if not (size > 0).all():
        raise ValueError(f"spacing must be positive, in mm, got {spacing}")
    return size


@functools.cache
def _template(spacing: tuple[float, ...]) -> tuple[_Array, _Array, NDArray[np.float64]]:
    """The 1 mm template and brain mask, low-passed for sampling at ``spacing``, and the affine."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            "synthetic subjects need nilearn, which carries the template: "
            'pip install "grcsf-kernels[demo]"'
        ) from error
    template = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    head = np.asarray(template.dataobj, np.float32)
    brain = np.asarray(mask.dataobj, np.float32)
    # A voxel of s mm averages over s mm; beyond this blur the coarse grid would alias.
    sigma = 0.35 * np.sqrt(np.maximum(np.square(spacing) - 1, 0))
    return (
        ndimage.gaussian_filter(head * brain / head.max(), sigma),
        ndimage.gaussian_filter(brain, sigma),
        np.asarray(template.affine, np.float64),
    )


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], waves: int) -> _Array:
    """A random field of unit variance made of the ``waves`` lowest cosines of each axis."""
    index = np.indices((waves,) * 3).sum(0)
    field = rng.standard_normal((waves,) * 3) / (1 + index)
    field[0, 0, 0] = 0  # no constant part: a field has no say in the position or the gain
    for length in shape:
        basis = np.cos(np.pi * np.outer(np.arange(waves), np.arange(length) + 0.5) / length)
        field = np.tensordot(field, basis, axes=(0, 0))  # the new axis goes last: 3 turns restore
    return (field / field.std()).astype(np.float32)


def _deformed_head(
    rng: np.random.Generator, spacing: NDArray[np.float64]
) -> tuple[_Array, _Mask, NDArray[np.float64]]:
    """Template and brain mask in a subject's own shape, on a grid of ``spacing`` mm."""
    head, brain, world = _template(tuple(float(s) for s in spacing))
    shape = tuple(int(n) for n in np.ceil(np.asarray(head.shape) / spacing))
    affine = world.copy()
    affine[:3, :3] = np.diag(spacing)
    affine[:3, 3] += (spacing - 1) / 2  # the outer faces of the two grids' first voxels meet

    angles = np.deg2rad(rng.uniform(-4, 4, 3))
    skew = np.array(
        [[0, -angles[2], angles[1]], [angles[2], 0, -angles[0]], [-angles[1], angles[0], 0]]
    )
    matrix = (np.eye(3) + skew) * rng.uniform(0.94, 1.06, 3)
    centre = (np.asarray(head.shape) - 1) / 2
    # Where in the template (in its voxels, which are 1 mm) each voxel of the subject comes from.
    grid = (
        np.indices(shape, np.float32).reshape(3, -1) * spacing[:, None]
        + ((spacing - 1) / 2 - centre)[:, None]
    )
    source = matrix @ grid + (centre + rng.uniform(-2, 2, 3))[:, None]
    for axis in range(3):
        source[axis] += rng.uniform(0.5, 2.0) * _smooth_field(rng, shape, 6).ravel()

    source = source.reshape(3, *shape)
    sampled = ndimage.map_coordinates(head, source, order=1)
    inside = ndimage.map_coordinates(brain, source, order=1) > 0.5
    return np.where(inside, sampled, 0).astype(np.float32), inside, affine


def _grow_lesion(
    rng: np.random.Generator, free: _Mask, volume: float, spacing: NDArray[np.float64]
) -> _Mask:
    """A connected blob of ``volume`` mm^3 (to the nearest voxel, at least one) within ``free``.

    It grows from a seed voxel, always by the neighbour that costs least; the cost is the distance
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
    cost = distance + 0.5 * _smooth_field(rng, inside.shape, 14)

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


def _darken(rng: np.random.Generator, head: _Array, lesion: _Mask) -> _Array:
    """Pull the lesion towards fluid: plainly in three of four lesions, subtly in the fourth."""
    subtle = rng.random() < 0.25
    strength = rng.uniform(0.2, 0.35) if subtle else rng.uniform(0.45, 0.95)
    edge = ndimage.gaussian_filter(lesion.astype(np.float32), 0.7)
    texture = 1 + 0.1 * _smooth_field(rng, head.shape, 12)
    weight = np.clip(strength * texture * (0.5 * lesion + 0.5 * edge), 0, 1)
    return head + weight * np.minimum(FLUID - head, 0)


def _scan(rng: np.random.Generator, head: _Array, brain: _Mask) -> _Array:
    """What a scanner would show: contrast, bias field, noise (Rician) and gain of its own."""
    contrast = head ** np.float32(rng.uniform(0.8, 1.25))
    bias = np.exp(rng.uniform(0.02, 0.12) * _smooth_field(rng, head.shape, 4))
    sigma = rng.uniform(0.01, 0.03)
    real, imaginary = rng.standard_normal((2, *head.shape), np.float32) * np.float32(sigma)
    signal = np.hypot(contrast * bias + real, imaginary) * rng.uniform(300, 1200)
    return np.where(brain, signal, 0).astype(np.float32)


def _write(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    write_whole(path, lambda temporary: nib.save(image, temporary))

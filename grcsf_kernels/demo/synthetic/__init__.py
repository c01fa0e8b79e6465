# SPDX-License-Identifier: Apache-2.0
"""Synthetic subjects: real anatomy, made into different heads, with lesions drawn into it.

The anatomy is that of the MNI152 template in the space and size of ATLAS v2.0 (197x233x189 voxels
of 1 mm): its T1 image and its maps of gray and white matter, which come inside the wheel of
``nilearn``; nothing is downloaded. Each subject is the template in a shape of its own
(:mod:`.anatomy`), with lesions (:mod:`.lesions`), as a scanner of its own shows it
(:mod:`.scanner`).

* ``"t1"``: stroke in T1 MRI. Lesions of 10 to 50,000 mm^3 in gray and white matter, from plainly
  dark to barely visible. What looks like them and is none: ventricles and sulci of any width,
  vessels, stripes of motion, the bias field.
* ``"ct"``: calcifications in CT. Lesions of 3 to 1,000 mm^3, bright. What looks like them and is
  none: the skull, spurs and plates of bone that grow from it, vessels with contrast agent.

What a network scores here says that it learns, not how it would do on patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.demo.synthetic import scanner
from grcsf_kernels.demo.synthetic.anatomy import deformed_head
from grcsf_kernels.demo.synthetic.lesions import grow_lesion, paint

LESION_VOLUME_MM3 = {"t1": (10.0, 50_000.0), "ct": (3.0, 1_000.0)}
_SCANNERS: dict[str, type[scanner.T1 | scanner.CT]] = {"t1": scanner.T1, "ct": scanner.CT}


def make_subject(
    seed: int | Sequence[int],
    spacing: float | Sequence[float] = 2.0,
    lesions: tuple[int, int] = (1, 3),
    modality: str = "t1",
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
    """One synthetic subject; the same seed gives the same subject.

    Anatomy, lesions and scanner have random streams of their own: the same seed with
    ``lesions=(0, 0)`` is the same head in the same scanner, healthy.

    Args:
        seed: integer, or several, as ``numpy.random.default_rng`` takes them.
        spacing: voxel size in mm, one number or one per axis.
        lesions: fewest and most lesions, both included. Their volumes are log-uniform.
        modality: ``"t1"`` (zero outside the brain) or ``"ct"`` (Hounsfield units, with the skull).

    Returns:
        The image (float32), the label (uint8, 1 in lesions) and the affine (float64 4x4, voxel
        indices to mm).

    Raises:
        ValueError: for a spacing that is not positive, a range of lesions that is none, or an
            unknown modality.
        ImportError: where nilearn is not installed.
    """
    size = _spacing(spacing)
    fewest, most = lesions
    if not 0 <= fewest <= most:
        raise ValueError(f"lesions must be (fewest, most) with 0 <= fewest <= most, got {lesions}")
    if modality not in _SCANNERS:
        known = " or ".join(map(repr, _SCANNERS))
        raise ValueError(f"modality must be {known}, got {modality!r}")
    body, pathology, machine = np.random.default_rng(seed).spawn(3)

    head = deformed_head(body, size)
    scan = _SCANNERS[modality](body, head)
    label = np.zeros(head.brain.shape, np.uint8)
    low, high = np.log(LESION_VOLUME_MM3[modality])
    for _ in range(int(pathology.integers(fewest, most, endpoint=True))):
        volume = float(np.exp(pathology.uniform(low, high)))
        free = scan.may_have_lesions & ~ndimage.binary_dilation(label, np.ones((3, 3, 3)))
        lesion = grow_lesion(pathology, free, volume, size)
        scan.signal = paint(pathology, scan.signal, lesion, scan.lesion_target, scan.strengths)
        label[lesion] = 1
    return scan.acquire(machine), label, head.affine


def make_dataset(
    folder: Path,
    count: int,
    seed: int = 0,
    spacing: float | Sequence[float] = 2.0,
    lesions: tuple[int, int] = (1, 3),
    progress: Callable[[int, int], None] | None = None,
    modality: str = "t1",
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
        modality: ``"t1"`` or ``"ct"``.

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
        image, label, affine = make_subject((seed, index), spacing, lesions, modality)
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


def _write(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    write_whole(path, lambda temporary: nib.save(image, temporary))

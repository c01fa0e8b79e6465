# SPDX-License-Identifier: Apache-2.0
"""Measures of a predicted lesion mask against the expert's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

from grcsf_kernels.engine.connectivity import NEIGHBORS


def dice(prediction: np.ndarray, label: np.ndarray) -> float:
    """2 |P and L| / (|P| + |L|); 1 where both are empty."""
    total = int(prediction.sum()) + int(label.sum())
    return 1.0 if total == 0 else 2 * int((prediction & label).sum()) / total


def _ratio(part: int, whole: int, other: int) -> float:
    """part / whole; for an empty whole, 1 if the other side is empty as well, else 0."""
    if whole:
        return part / whole
    return 1.0 if other == 0 else 0.0


def lesion_f1(prediction: np.ndarray, label: np.ndarray) -> tuple[float, int, int, int]:
    """F1 over lesions, and the counts of found, missed and false ones.

    A lesion is a 26-connected component. One of the label is found if it shares a voxel with the
    prediction; one of the prediction that shares none with the label is false. 1 where there are
    neither.
    """
    lesions, count = ndimage.label(label, NEIGHBORS)
    predicted, predicted_count = ndimage.label(prediction, NEIGHBORS)
    found = len(np.unique(lesions[prediction & label]))
    hit = len(np.unique(predicted[prediction & label]))
    missed, false = count - found, predicted_count - hit
    total = 2 * found + missed + false
    return (1.0 if total == 0 else 2 * found / total), found, missed, false


def find_lesions(
    prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> list[tuple[float, bool]]:
    """Volume in mm^3 of every lesion of the label, and whether it was found (:func:`lesion_f1`)."""
    if not label.any():
        return []
    box = ndimage.find_objects(label.astype(np.uint8))[0]
    lesions, count = ndimage.label(label[box], NEIGHBORS)
    sizes = np.bincount(lesions.ravel(), minlength=count + 1) * float(np.prod(spacing))
    found = set(np.unique(lesions[prediction[box] & label[box]]).tolist())
    return [(float(sizes[lesion]), lesion in found) for lesion in range(1, count + 1)]


def hd95(prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the symmetric surface distances in mm; NaN where a mask is empty."""
    if not prediction.any() or not label.any():
        return math.nan
    # Distances need only the box around both masks.
    both = ndimage.find_objects((prediction | label).astype(np.uint8))[0]
    box = tuple(slice(max(axis.start - 1, 0), axis.stop + 1) for axis in both)
    one, two = (torch.from_numpy(m[box].astype(np.uint8))[None, None] for m in (prediction, label))
    sizes = [float(size) for size in spacing]
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 call a function of their own with an argument that they deprecate.
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(
            one, two, include_background=True, percentile=95, spacing=sizes
        )
    return float(distance)


def measure(
    prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> dict[str, float]:
    """All measures of one case.

    Args:
        prediction: bool [X, Y, Z].
        label: bool [X, Y, Z].
        spacing: voxel sizes in mm.

    Returns:
        ``dice``, ``lesion_f1``, ``sensitivity`` and ``precision`` of voxels, ``hd95`` in mm,
        ``volume_difference`` (predicted minus true) in mm^3, and the counts ``lesions_found``,
        ``lesions_missed``, ``lesions_false``.
    """
    overlap = int((prediction & label).sum())
    predicted, true = int(prediction.sum()), int(label.sum())
    score, found, missed, false = lesion_f1(prediction, label)
    return {
        "dice": dice(prediction, label),
        "lesion_f1": score,
        "sensitivity": _ratio(overlap, true, predicted),
        "precision": _ratio(overlap, predicted, true),
        "hd95": hd95(prediction, label, spacing),
        "volume_difference": (predicted - true) * float(np.prod(spacing)),
        "lesions_found": found,
        "lesions_missed": missed,
        "lesions_false": false,
    }

# SPDX-License-Identifier: Apache-2.0
"""Whether residual maps rank lesion voxels over healthy ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from benchmarks.study.comparison import class_name, mean_of
from grcsf_kernels.engine.connectivity import NEIGHBORS
from grcsf_kernels.engine.evaluation.bootstrap import LESION_SIZES

ALL = "all"


def size_classes(label: NDArray[np.bool_], voxel_mm3: float) -> dict[str, NDArray[np.bool_]]:
    """The voxels of all lesions, and of those of each class of size that there are.

    Args:
        label: [X, Y, Z].
        voxel_mm3: volume of a voxel.
    """
    lesions, count = ndimage.label(label, NEIGHBORS)
    volumes = np.bincount(lesions.ravel(), minlength=count + 1) * voxel_mm3
    found = {ALL: label}
    for low, high in itertools.pairwise((*LESION_SIZES, None)):
        assert low is not None
        chosen = (volumes >= low) & (volumes < (math.inf if high is None else high))
        chosen[0] = False
        if chosen.any():
            found[class_name(low, high)] = chosen[lesions]
    return found


def areas_under_curve(
    score: NDArray[np.floating],
    label: NDArray[np.bool_],
    inside: NDArray[np.bool_],
    voxel_mm3: float,
) -> dict[str, float]:
    """ROC AUC of a map: how often a lesion voxel has a higher value than a healthy one.

    Args:
        score: [X, Y, Z], such as a residual map.
        label: lesions.
        inside: the brain. Healthy are its voxels outside of all lesions.
        voxel_mm3: volume of a voxel.

    Returns:
        By class of lesion size; a class without a lesion is left out.
    """
    healthy = score[inside & ~label]
    areas = {}
    for name, lesions in size_classes(label, voxel_mm3).items():
        sick = score[lesions & inside]
        if sick.size and healthy.size:
            truth = np.repeat([True, False], [sick.size, healthy.size])
            areas[name] = float(roc_auc_score(truth, np.concatenate([sick, healthy])))
    return areas


def summarize(cases: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean over subjects, by class of lesion size, with its 95 % bootstrap interval."""
    summary = {}
    for name in sorted({name for case in cases for name in case}, key=_order):
        values = [case[name] for case in cases if name in case]
        summary[name] = {"subjects": len(values), **mean_of(values)}
    return summary


def _order(name: str) -> float:
    return -1.0 if name == ALL else float(name.split()[0])


def reference_scores(image: NDArray[np.floating]) -> dict[str, NDArray[np.floating]]:
    """What a map has to beat: how dark a voxel is, and how strong the edge there is."""
    return {"darkness": -image, "edges": ndimage.gaussian_gradient_magnitude(image, 1.0)}

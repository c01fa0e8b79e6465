# SPDX-License-Identifier: Apache-2.0
"""Whether the subjects ask for more than intensities: plain models must do badly on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier

from benchmarks.study import protocol
from benchmarks.study.comparison import mean_of
from grcsf_kernels.engine.data.samples import Preprocessing, load_sample
from grcsf_kernels.engine.evaluation.metrics import dice, lesion_f1
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.report import Report

_SCALES = (1.0, 2.0, 4.0)  # voxels, of the neighborhoods whose mean a model sees
_WIDE = (8.0, 16.0)
_VOXELS = 4000  # of each kind that a model learns from, in every subject
_LEVELS = np.linspace(0.02, 0.98, 49)

# Image, lesions, brain, and the residual maps [K, X, Y, Z] where they are asked for.
Case = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32] | None]


def measure_difficulty(
    training: Path, held_out: Path, maps: tuple[Path, Path] | None = None
) -> dict[str, Any]:
    """Mean Dice and lesion F1 of plain models on held-out subjects.

    * ``threshold``: darker than a value of the normalized image, the best one of the training
      subjects.
    * ``intensity``: the share of lesion voxels at each intensity, by boosted trees.
    * ``neighborhood``: the same with the means of the neighborhood at three scales, and the place
      in the head.
    * ``neighborhood and maps``, with ``maps``: the same with the residual maps and their means of
      the neighborhood. What it gains is what the maps know beyond these means of the image.
    * ``wide neighborhood``, with ``maps``: without them, with means at two further scales.

    Args:
        training: folder of subjects that the models are fitted on.
        held_out: folder of subjects that are measured.
        maps: the residual maps of both.

    Returns:
        By model, ``dice`` and ``lesion_f1`` with their means and intervals over subjects.
    """
    learn = _read(training, maps and maps[0])
    measured = _read(held_out, maps and maps[1])
    levels = np.linspace(-3, 1.5, 46)
    found = {"threshold": _scores(lambda case: -case[0], -levels, learn, measured)}
    models = {"intensity": _intensity, "neighborhood": _neighborhood}
    if maps:
        models |= {"neighborhood and maps": _with_maps, "wide neighborhood": _wide}
    for name, features in models.items():
        model = _fit(features, learn)

        def probability(case: Case, features: Any = features, model: Any = model) -> Any:
            image, _, inside, _ = case
            score = np.zeros(image.shape, np.float32)
            score[inside] = model.predict_proba(features(case)[inside])[:, 1]
            return score

        found[name] = _scores(probability, _LEVELS, learn, measured)
    return found


def _read(folder: Path, maps: Path | None) -> list[Case]:
    preprocessing = Preprocessing(protocol.DATA)
    cases = []
    for case in find_cases(folder, Report(), labels=True):
        sample = load_sample(case, preprocessing, labels=True, residuals=maps)
        assert sample.label is not None
        image = sample.image[0].numpy()
        residual = None if sample.residual is None else sample.residual.numpy()
        cases.append((image, sample.label[0].numpy() > 0, image != 0, residual))
    return cases


def _intensity(case: Case) -> NDArray[np.float32]:
    return case[0][..., None]


def _neighborhood(case: Case) -> NDArray[np.float32]:
    image = case[0]
    means = [ndimage.gaussian_filter(image, sigma) for sigma in _SCALES]
    places = np.indices(image.shape, np.float32)
    # Left and right are alike.
    places[0] = np.abs(places[0] - image.shape[0] / 2)
    return np.stack([image, *means, *places], axis=-1)


def _wide(case: Case) -> NDArray[np.float32]:
    means = [ndimage.gaussian_filter(case[0], sigma) for sigma in _WIDE]
    return np.concatenate([_neighborhood(case), np.stack(means, axis=-1)], axis=-1)


def _with_maps(case: Case) -> NDArray[np.float32]:
    assert case[3] is not None
    means = [ndimage.gaussian_filter(one, sigma) for one in case[3] for sigma in _SCALES]
    return np.concatenate([_neighborhood(case), np.stack([*case[3], *means], axis=-1)], axis=-1)


def _fit(features: Any, cases: list[Case]) -> HistGradientBoostingClassifier:
    """A model of lesion against healthy voxels, as many of each from every subject."""
    rng = np.random.default_rng(0)
    rows, truth = [], []
    for case in cases:
        values = features(case)
        for kind in (False, True):
            places = np.argwhere(case[2] & (case[1] == kind))
            chosen = places[rng.integers(len(places), size=_VOXELS)]
            rows.append(values[tuple(chosen.T)])
            truth.append(np.full(_VOXELS, kind))
    model = HistGradientBoostingClassifier(random_state=0)
    return model.fit(np.concatenate(rows), np.concatenate(truth))


def _scores(score: Any, levels: Any, learn: list[Case], measured: list[Case]) -> dict[str, Any]:
    """Above the level that is best on the training subjects."""
    sums = np.zeros(len(levels))
    for case in learn:
        values = score(case)
        sums += [dice((values > level) & case[2], case[1]) for level in levels]
    level = levels[int(sums.argmax())]
    rows: dict[str, list[float]] = {"dice": [], "lesion_f1": []}
    for case in measured:
        mask = (score(case) > level) & case[2]
        rows["dice"].append(dice(mask, case[1]))
        rows["lesion_f1"].append(lesion_f1(mask, case[1])[0])
    return {name: mean_of(values) for name, values in rows.items()}

# SPDX-License-Identifier: Apache-2.0
"""The arms, the scales and the settings of every run: PROTOCOL.md in code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from grcsf_kernels import engine
from grcsf_kernels.common.settings import to_dict

SEEDS = (0, 1, 2)
# Of the subjects. Development subjects, on which settings are chosen, are none of the study's.
TRAINING, HELD_OUT, DEVELOPMENT = 8_000_001, 8_000_002, 8_000_003
LESIONS = (2, 6)  # of a subject
MASK_RATIOS = (0.5, 0.75)
MASKINGS = ("random", "complementary")
DRAWS = 4
DATA = engine.DataConfig(crop_foreground=True)  # preprocessing, the same everywhere


@dataclass(frozen=True)
class Arm:
    """One network.

    Attributes:
        title: in tables.
        compensation: of the GCUs; None: none.
        masking: of the residual maps that the RCUs attend to; None: no RCUs.
        widened: with the widened channels of the scale.
    """

    title: str
    compensation: str | None = None
    masking: str | None = None
    widened: bool = False


BASELINE = "backbone"
ARMS = {
    BASELINE: Arm("backbone"),
    "gcu": Arm("+ GCU, dissimilarity", "dissimilarity"),
    "gcu-similarity": Arm("+ GCU, similarity", "similarity"),
    "rcu": Arm("+ RCU", masking="random"),
    "both": Arm("+ GCU + RCU", "dissimilarity", "random"),
    "both-complementary": Arm("+ GCU + RCU, complementary", "dissimilarity", "complementary"),
    "widened": Arm("backbone, widened", widened=True),
}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name: of the scale.
        spacing: of the subjects, mm.
        training: subjects that are trained on, residual maps included.
        held_out: subjects that are measured.
        channels: of the backbone's levels.
        widened: of the widened backbone, which has the parameters and the time of the full model.
        crop: edge of training crops and prediction windows, voxels.
        batch: crops of a step.
        steps: of training.
        learning_rate: of training.
        rcu_levels: decoder levels with an RCU.
        rcu_patch: edge of an RCU's patch, voxels of its level.
        reduction: of the gates.
        autoencoder: the networks that make the maps.
        autoencoder_crop: voxels per axis, a multiple of the autoencoder's patch.
        autoencoder_steps: of pretraining, each of ``batch`` crops.
        precision: as Lightning Fabric names it.
        overlap: of windows in prediction.
        development: subjects that settings are chosen on; half as many are measured there.
    """

    name: str
    spacing: float
    training: int
    held_out: int
    channels: tuple[int, ...]
    widened: tuple[int, ...]
    crop: int
    batch: int
    steps: int
    learning_rate: float
    rcu_levels: tuple[int, ...]
    rcu_patch: int
    reduction: int
    autoencoder: engine.AutoencoderConfig
    autoencoder_crop: tuple[int, int, int]
    autoencoder_steps: int
    precision: str = "32-true"
    overlap: float = 0.25
    development: int = 24


def subject_sets(scale: Scale) -> dict[str, tuple[int, int, tuple[int, int]]]:
    """Number, seed and number of lesions of each set of subjects."""
    return {
        "training": (scale.training, TRAINING, LESIONS),
        "held_out": (scale.held_out, HELD_OUT, LESIONS),
        "development": (scale.development, DEVELOPMENT, LESIONS),
        "development_held_out": (scale.development // 2, DEVELOPMENT + 1, LESIONS),
        "development_healthy": (scale.development, DEVELOPMENT + 2, (0, 0)),
    }


def _optimization(
    scale: Scale, steps: int, batch: int, rate: float, seed: int
) -> engine.OptimizationConfig:
    epochs = min(10, steps)
    return engine.OptimizationConfig(
        epochs=epochs,
        steps_per_epoch=steps // epochs,
        batch_size=batch,
        learning_rate=rate,
        warmup_epochs=0.5,
        precision=scale.precision,
        seed=seed,
    )


def pretraining(scale: Scale, seed: int) -> engine.PretrainConfig:
    """Settings of the autoencoders of a seed."""
    return engine.PretrainConfig(
        data=DATA,
        model=scale.autoencoder,
        optimization=_optimization(scale, scale.autoencoder_steps, scale.batch, 1e-3, seed),
        crop_size=scale.autoencoder_crop,
        mirror_axes=(0,),
    )


def residuals(masking: str, seed: int) -> engine.ResidualsConfig:
    """Settings of the residual maps."""
    return engine.ResidualsConfig(draws=DRAWS, masking=masking, overlap=0.25, seed=seed)


def training(scale: Scale, arm: Arm, seed: int) -> engine.TrainConfig:
    """Settings of a network: those of the arms differ in ``model`` alone."""
    return engine.TrainConfig(
        data=DATA,
        model=engine.ModelConfig(
            channels=scale.widened if arm.widened else scale.channels,
            rcu_levels=scale.rcu_levels,
            patch_size=(scale.rcu_patch,) * 3,
            reduction=scale.reduction,
            compensation=arm.compensation or "dissimilarity",
            use_gcu=arm.compensation is not None,
            use_rcu=arm.masking is not None,
        ),
        optimization=_optimization(scale, scale.steps, scale.batch, scale.learning_rate, seed),
        augmentation=engine.AugmentationConfig(enabled=False),
        crop_size=(scale.crop,) * 3,
        mirror_axes=(0,),
        validation_fraction=0.0,
    )


def prediction(scale: Scale) -> engine.PredictConfig:
    """Settings of segmentation, the same for every arm."""
    return engine.PredictConfig(overlap=scale.overlap, batch_size=scale.batch, skip_air=True)


def maps_identity(scale: Scale, seed: int) -> dict[str, Any]:
    """All that the residual maps of a seed depend on, in JSON's types."""
    return plain(
        {
            "subjects": subject_sets(scale),
            "spacing": scale.spacing,
            "pretraining": to_dict(pretraining(scale, seed)),
            "residuals": [to_dict(residuals(masking, seed)) for masking in MASKINGS],
        }
    )


def identity(scale: Scale, arm: Arm, seed: int) -> dict[str, Any]:
    """All that the result of a run depends on, in JSON's types; a result with another is old."""
    return plain(
        {
            "subjects": subject_sets(scale),
            "spacing": scale.spacing,
            "training": to_dict(training(scale, arm, seed)),
            "prediction": to_dict(prediction(scale)),
            "masking": arm.masking,
            "maps": maps_identity(scale, seed) if arm.masking else None,
        }
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: what is compared with what a result was saved with."""
    return json.loads(json.dumps(values))

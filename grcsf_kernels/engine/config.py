# SPDX-License-Identifier: Apache-2.0
"""Settings as typed dataclasses. Every default stands here, with what the setting may be and means.

The text under each setting is what ``grcsf config`` and the documentation say of it. How settings
are checked: ``settings.py``; read and written: ``settings_yaml.py``.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import (
    Ascending,
    Bounds,
    Count,
    CountOrZero,
    Distinct,
    NotEmpty,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    ShareBetween,
    to_dict,
    update,
)
from grcsf_kernels.engine.settings_yaml import dump_config, load_config, save_config
from grcsf_kernels.models.inputs import DataConfig

__all__ = [
    "PRESETS",
    "AugmentationConfig",
    "AutoencoderConfig",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimizationConfig",
    "PredictConfig",
    "PretrainConfig",
    "ResidualsConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "preset",
    "run_identity",
    "save_config",
]

Triple = tuple[Count, Count, Count]
Axes = Annotated[tuple[Literal[0, 1, 2], ...], Distinct()]
Range = Annotated[tuple[Positive, Positive], Ascending()]
# Of labels, as files hold them.
Label = Annotated[int, Bounds(least=-(2**31), most=2**31 - 1)]
Labels = Annotated[tuple[Label, ...], NotEmpty()]
Device = Literal["auto", "cpu", "cuda"]
Place = Literal["auto", "device", "cpu", "disk"]
Resolution = Annotated[float, Bounds(above=0), Bounds(most=1)]


@dataclass
class AutoencoderConfig:
    """The masked autoencoders, one for each mask ratio."""

    mask_ratios: Annotated[tuple[ShareBetween, ...], NotEmpty()] = (0.5, 0.75)
    """Share of the patches that are hidden; each ratio is a model file and a residual map."""
    patch_size: Triple = (16, 16, 16)
    """Voxels of a patch."""
    embed_dim: Count = 384
    """Features of a patch in the encoder; a multiple of num_heads."""
    depth: Count = 6
    """Transformer blocks of the encoder."""
    num_heads: Count = 6
    """Attention heads of the encoder."""
    decoder_dim: Count = 192
    """Features of a patch in the decoder; a multiple of decoder_heads."""
    decoder_depth: Count = 2
    """Transformer blocks of the decoder."""
    decoder_heads: Count = 6
    """Attention heads of the decoder."""
    normalized_target: bool = False
    """Reconstruct each patch normalized; a lesion that fills a patch does not show then."""
    position_base: Positive = 10.0
    """Of the positions: longest over shortest wavelength."""


@dataclass
class ModelConfig:
    """The segmentation network; see grcsf_kernels.models.GRCSF."""

    channels: Annotated[tuple[Count, ...], NotEmpty()] = (16, 32, 64, 128, 256)
    """Features of each level; every level has half the resolution of the one before."""
    blocks_per_level: Count = 1
    """Residual blocks in each level of encoder and decoder."""
    rcu_levels: Annotated[tuple[CountOrZero, ...], Distinct()] = (0,)
    """Decoder levels with a Region Compensation Unit; 0 is the finest."""
    num_heads: Count = 4
    """Attention heads of the RCU."""
    head_dim: Count = 8
    """Features of an attention head."""
    patch_size: Triple = (4, 4, 4)
    """Voxels of the RCU's level; its attention is no finer."""
    reduction: Count = 16
    """Of the channels inside the gates."""
    compensation: Literal["dissimilarity", "similarity"] = "dissimilarity"
    """Of the Global Compensation Unit: strengthen what deeper features lack, or what they share."""
    score_channels: Count = 32
    """Hidden units of the network that scores the RCU's patches."""
    use_gcu: bool = True
    """Global Compensation Units in the skips."""
    use_rcu: bool = True
    """Region Compensation Units; training and prediction then need residual maps."""
    deep_supervision: bool = False
    """Heads on the deeper decoder levels too, in training only."""


@dataclass
class OptimizationConfig:
    """What pretraining and training share: AdamW, warm-up, cosine decay to 0."""

    epochs: Count = 200
    """A training state is written after each."""
    steps_per_epoch: Count = 100
    """Steps of the optimizer."""
    batch_size: Count = 2
    """Crops that go through the network together, on each process."""
    accumulate_batches: Count = 1
    """Such batches for one step of the optimizer."""
    learning_rate: Positive = 5e-4
    """Its peak, after the warm-up."""
    weight_decay: NotNegative = 0.01
    """Of AdamW."""
    warmup_epochs: NotNegative = 2.0
    """In which the learning rate rises from 0; at most half of the training."""
    clip_norm: Positive = 1.0
    """A gradient with a larger norm is scaled down to it."""
    ema_decay: ShareBelowOne = 0.0
    """Of the average of the weights, which is what is kept; 0: no average."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of activations; 16-mixed on CUDA only."""
    device: Device = "auto"
    """auto: CUDA where there is a GPU."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Of several processes: ddp, or fsdp (weights in parts); auto: ddp."""
    timeout_minutes: Annotated[float, Bounds(above=0), Bounds(most=1_000_000)] = 30.0
    """Of collectives between processes; must exceed one validation pass."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    compile: bool = False
    """torch.compile."""
    seed: Seed = 0
    """Random seed."""
    cache_gb: NotNegative = 8.0
    """Of cases kept in memory; the rest are read again when needed."""
    cache_dir: str | None = None
    """Folder for preprocessed cases; null: preprocessed in every run."""
    workers: CountOrZero = 0
    """Processes that make crops ahead; 0: made when they are needed."""
    checkpoint_every: CountOrZero = 0
    """Steps between states within an epoch; 0: after each epoch only."""


@dataclass
class PretrainConfig:
    """grcsf pretrain."""

    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    crop_size: Triple = (96, 96, 96)
    """Voxels, a multiple of the patch size."""
    mirror_axes: Axes = (0, 1, 2)
    """Mirrored at random; 0: left and right only."""


@dataclass
class ResidualsConfig:
    """grcsf residuals, and the maps that grcsf predict makes on the way."""

    draws: Count = 4
    """Masks for each window."""
    masking: Literal["complementary", "random"] = "complementary"
    """complementary: every patch is hidden equally often; random: each draw on its own."""
    overlap: ShareBelowOne = 0.5
    """Of neighboring windows."""
    skip_air: bool = False
    """No windows in which the image is 0 everywhere; the maps are 0 there."""
    accumulate: Place = "auto"
    """Where volumes are; auto: cpu up to memory_gb, then disk."""
    memory_gb: NotNegative = 4.0
    """Of volumes, for accumulate: auto; what is more goes to disk."""
    precision: Literal["float32", "float16"] = "float32"
    """Of the maps while they are kept."""
    device: Device = "auto"
    """auto: CUDA where there is a GPU."""
    seed: Seed = 0
    """Of the masks."""


@dataclass
class AugmentationConfig:
    """What grcsf train does to crops at random, each with its own probability (0: never).

    Rotation and scaling move image, label and residual maps together; the rest changes the image
    alone, in units of its normalized intensities.
    """

    enabled: bool = True
    """false: mirroring alone."""
    affine_probability: Share = 0.2
    """Of rotation and scaling, which come together."""
    rotation: tuple[NotNegative, NotNegative, NotNegative] = (30.0, 30.0, 30.0)
    """Degrees, about each axis, to either side."""
    scaling: Range = (0.8, 1.25)
    """Of the size of what is seen, each axis on its own."""
    noise_probability: Share = 0.1
    """Of Gaussian noise."""
    noise: NotNegative = 0.1
    """Largest standard deviation."""
    blur_probability: Share = 0.15
    """Of Gaussian blur."""
    blur: Range = (0.5, 1.0)
    """Voxels, standard deviation."""
    brightness_probability: Share = 0.15
    """Of brightness."""
    brightness: Share = 0.25
    """Factors from 1 - 0.25 to 1 + 0.25."""
    contrast_probability: Share = 0.15
    """Of contrast."""
    contrast: Share = 0.25
    """The same, about the mean."""
    gamma_probability: Share = 0.2
    """Of gamma."""
    gamma: Range = (0.7, 1.5)
    """Exponents, between the image's own extremes."""
    low_resolution_probability: Share = 0.15
    """Of a lower resolution, down and up again."""
    low_resolution: Annotated[tuple[Resolution, Resolution], Ascending()] = (0.5, 1.0)
    """Of the resolution."""


@dataclass
class TrainConfig:
    """grcsf train."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    crop_size: Triple = (96, 96, 96)
    """Voxels; smaller volumes are padded."""
    mirror_axes: Axes = (0, 1, 2)
    """Mirrored at random; 0: left and right only."""
    foreground: Share = 0.67
    """Share of crops that are centered on a lesion voxel; the rest lie anywhere."""
    lesion_labels: Labels | None = None
    """Label values merged to the lesion; null: 1."""
    validation_fraction: ShareBelowOne = 0.1
    """Of the subjects; 0: none, and the last epoch is kept."""
    folds: CountOrZero = 0
    """Of cross-validation, before validation_fraction; 0: none."""
    fold: CountOrZero = 0
    """Which of the folds, or of the splits in splits_file, validates."""
    splits_file: str | None = None
    """nnU-Net's splits_final.json, before folds."""
    validation_every: Count = 10
    """Epochs; the last one is always validated."""
    overlays: CountOrZero = 0
    """Validation cases drawn into the TensorBoard logs."""

    def agree(self, where: str) -> None:
        """Whether the settings go together; :func:`check` calls it."""
        if self.folds == 1:
            raise InputError(f"{where}folds", "is 1", "expected 0 or at least 2")
        if self.fold and not self.folds and self.splits_file is None:
            raise InputError(f"{where}fold", f"is {self.fold}", "set folds or splits_file as well")
        if self.folds and not self.fold < self.folds:
            remedy = f"expected below folds, {self.folds}"
            raise InputError(f"{where}fold", f"is {self.fold}", remedy)


@dataclass
class PredictConfig:
    """grcsf predict."""

    threshold: ShareBetween = 0.5
    """Of the probability: from it on a voxel is lesion."""
    overlap: ShareBelowOne = 0.5
    """Of neighboring windows."""
    batch_size: Count = 2
    """Windows at once; halved where memory runs out."""
    mirror_axes: Axes = ()
    """Mean over mirrored images; n axes take 2^n times as long."""
    rcu_threshold: Share = 0.0
    """RCU patches with a lower score are left as they are; 0: exact."""
    min_lesion_mm3: NotNegative = 0.0
    """Smaller components are removed."""
    skip_air: bool = False
    """No windows in which the image is 0 everywhere; there is no lesion."""
    accumulate: Place = "auto"
    """Where volumes are; auto: cpu up to memory_gb, then disk."""
    memory_gb: NotNegative = 4.0
    """Of volumes, for accumulate: auto; what is more goes to disk."""
    precision: Literal["float32", "float16"] = "float32"
    """Of the probabilities while they are kept."""
    probabilities: bool = False
    """Also write <case>_probability.nii.gz."""
    uncertainty: bool = False
    """Also write <case>_uncertainty.nii.gz, bits."""
    device: Device = "auto"
    """auto: CUDA where there is a GPU."""
    residuals: ResidualsConfig = field(default_factory=ResidualsConfig)


@dataclass
class EvaluateConfig:
    """grcsf evaluate."""

    cases: CountOrZero = 20
    """Whose slices evaluation.html shows, the lowest Dice first."""
    lesion_labels: Labels | None = None
    """Label values merged to the lesion; null: 1."""


# What a run may change when it goes on: its weights do not depend on them.
_FREE = (
    *("workers", "checkpoint_every", "timeout_minutes", "cache_gb", "overlays"),
    "gradient_checkpointing",
)


def run_identity(config: Any, *more: object) -> str:
    """All that the weights of a training depend on: its settings, and ``more``, as text."""
    values = {key: value for key, value in to_dict(config).items() if key not in _FREE}
    chosen = values["optimization"].items()
    values["optimization"] = {key: value for key, value in chosen if key not in _FREE}
    return json.dumps([values, *more])


# Beside the defaults, which are for a GPU: what is tried out on a CPU.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "pretrain": {
            "model": {
                "patch_size": (8, 8, 8),
                "embed_dim": 96,
                "depth": 3,
                "num_heads": 4,
                "decoder_dim": 96,
                "decoder_depth": 1,
                "decoder_heads": 4,
            },
            "optimization": {"epochs": 20, "steps_per_epoch": 50, "learning_rate": 1e-3},
            "crop_size": (48, 48, 48),
        },
        "train": {
            "model": {"channels": (8, 16, 32, 64), "reduction": 4},
            "optimization": {"epochs": 40, "steps_per_epoch": 50, "learning_rate": 2e-3},
            "crop_size": (48, 48, 48),
        },
    }
}


def preset(name: str, command: str) -> Any:
    """The settings of a preset.

    Args:
        name: one of ``PRESETS``.
        command: ``"pretrain"`` or ``"train"``.

    Raises:
        InputError: the command has no such preset.
    """
    values = PRESETS.get(name, {}).get(command)
    if values is None:
        known = ", ".join(f"{have} of {other}" for have in PRESETS for other in PRESETS[have])
        raise InputError("--preset", f"{command} has no preset {name!r}", f"there is: {known}")
    base = {"pretrain": PretrainConfig, "train": TrainConfig}[command]()
    return update(base, copy.deepcopy(values), f"preset {name}")

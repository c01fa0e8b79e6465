# SPDX-License-Identifier: Apache-2.0
"""Settings as typed dataclasses, and their YAML form. Every default stands here."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.files import write_whole

Triple = tuple[int, int, int]


@dataclass
class DataConfig:
    """How volumes become tensors. Axes are those of the volume in RAS orientation."""

    spacing: tuple[float, float, float] | None = None  # mm; null keeps each image's own
    intensity: str = "zscore"  # zscore: over voxels that are not 0; window: clip, then to [0, 1]
    window: tuple[float, float] = (-200.0, 800.0)  # Hounsfield units, for intensity: window
    channel_windows: tuple[tuple[float, float], ...] = ()  # one for each channel, before window
    crop_foreground: bool = False  # leave out the air around: not 0, or above the window's low end
    bids_suffixes: tuple[str, ...] = ("T1w",)  # of BIDS images, one for each channel


@dataclass
class AutoencoderConfig:
    """The masked autoencoders, one for each mask ratio."""

    mask_ratios: tuple[float, ...] = (0.5, 0.75)
    patch_size: Triple = (16, 16, 16)  # voxels
    embed_dim: int = 384
    depth: int = 6
    num_heads: int = 6
    decoder_dim: int = 192
    decoder_depth: int = 2
    decoder_heads: int = 6
    normalized_target: bool = False  # a lesion that fills a patch shows only against intensities
    position_base: float = 10.0  # of the positions, longest over shortest wavelength


@dataclass
class ModelConfig:
    """The segmentation network; see grcsf_kernels.models.GRCSF."""

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    blocks_per_level: int = 1
    rcu_levels: tuple[int, ...] = (0,)
    num_heads: int = 4
    head_dim: int = 8
    patch_size: Triple = (4, 4, 4)  # voxels of the RCU's level; its attention is no finer
    reduction: int = 16
    compensation: str = "dissimilarity"
    score_channels: int = 32
    use_gcu: bool = True
    use_rcu: bool = True
    deep_supervision: bool = False  # heads on the deeper decoder levels too, in training only


@dataclass
class OptimizationConfig:
    """What pretraining and training share: AdamW, warm-up, cosine decay to 0."""

    epochs: int = 200
    steps_per_epoch: int = 100
    batch_size: int = 2  # crops that go through the network together, on each process
    accumulate_batches: int = 1  # such batches for one step of the optimizer
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_epochs: float = 2.0
    clip_norm: float = 1.0  # of the gradient
    ema_decay: float = 0.0  # of the average of the weights, which is what is kept; 0: no average
    precision: str = "32-true"  # 32-true, bf16-mixed or 16-mixed
    device: str = "auto"  # auto, cpu or cuda
    strategy: str = "auto"  # of several processes: ddp, or fsdp (weights in parts); auto: ddp
    timeout_minutes: float = 30.0  # for which a process waits for the others; above a validation
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    compile: bool = False  # torch.compile
    seed: int = 0
    cache_gb: float = 8.0  # of cases kept in memory; the rest are read again when needed
    cache_dir: str | None = None  # folder for preprocessed cases; null: preprocessed in every run
    workers: int = 0  # processes that make crops ahead; 0: made when they are needed
    checkpoint_every: int = 0  # steps between states within an epoch; 0: after each epoch only


@dataclass
class PretrainConfig:
    """grcsf pretrain."""

    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    crop_size: Triple = (96, 96, 96)  # voxels, a multiple of the patch size
    mirror_axes: tuple[int, ...] = (0, 1, 2)  # mirrored at random; 0: left and right only


@dataclass
class ResidualsConfig:
    """grcsf residuals, and the maps that grcsf predict makes on the way."""

    draws: int = 4  # masks for each window
    masking: str = "complementary"  # or random
    overlap: float = 0.5  # of neighboring windows
    skip_air: bool = False  # no windows in which the image is 0 everywhere; the maps are 0 there
    accumulate: str = "auto"  # where volumes are: device, cpu, disk, or cpu up to memory_gb
    memory_gb: float = 4.0  # of volumes, for accumulate: auto; what is more goes to disk
    precision: str = "float32"  # of the maps while they are kept: float32 or float16
    device: str = "auto"
    seed: int = 0


@dataclass
class AugmentationConfig:
    """What grcsf train does to crops at random, each with its own probability (0: never).

    Rotation and scaling move image, label and residual maps together; the rest changes the image
    alone, in units of its normalized intensities.
    """

    enabled: bool = True  # false: mirroring alone
    affine_probability: float = 0.2
    rotation: tuple[float, float, float] = (30.0, 30.0, 30.0)  # degrees, about each axis
    scaling: tuple[float, float] = (0.8, 1.25)  # of the size of what is seen, each axis on its own
    noise_probability: float = 0.1
    noise: float = 0.1  # largest standard deviation
    blur_probability: float = 0.15
    blur: tuple[float, float] = (0.5, 1.0)  # voxels, standard deviation
    brightness_probability: float = 0.15
    brightness: float = 0.25  # factors from 1 - 0.25 to 1 + 0.25
    contrast_probability: float = 0.15
    contrast: float = 0.25  # the same, about the mean
    gamma_probability: float = 0.2
    gamma: tuple[float, float] = (0.7, 1.5)  # exponents, between the image's own extremes
    low_resolution_probability: float = 0.15
    low_resolution: tuple[float, float] = (0.5, 1.0)  # of the resolution


@dataclass
class TrainConfig:
    """grcsf train."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    crop_size: Triple = (96, 96, 96)  # voxels; smaller volumes are padded
    mirror_axes: tuple[int, ...] = (0, 1, 2)  # mirrored at random; 0: left and right only
    foreground: float = 0.67  # share of crops that are centered on a lesion voxel
    lesion_labels: tuple[int, ...] | None = None  # label values merged to the lesion; null: 1
    validation_fraction: float = 0.1  # of the subjects; 0: none, the last epoch is kept
    folds: int = 0  # of cross-validation, before validation_fraction; 0: none
    fold: int = 0  # which of the folds, or of the splits in splits_file, validates
    splits_file: str | None = None  # nnU-Net's splits_final.json, before folds
    validation_every: int = 10  # epochs
    overlays: int = 0  # validation cases drawn into the TensorBoard logs


@dataclass
class PredictConfig:
    """grcsf predict."""

    threshold: float = 0.5
    overlap: float = 0.5  # of neighboring windows
    batch_size: int = 2  # windows at once; halved where memory runs out
    mirror_axes: tuple[int, ...] = ()  # mean over mirrored images; n axes take 2^n times as long
    rcu_threshold: float = 0.0  # RCU patches with a lower score are left as they are; 0: exact
    min_lesion_mm3: float = 0.0  # smaller components are removed
    skip_air: bool = False  # no windows in which the image is 0 everywhere; there is no lesion
    accumulate: str = "auto"  # where volumes are: device, cpu, disk, or cpu up to memory_gb
    memory_gb: float = 4.0  # of volumes, for accumulate: auto; what is more goes to disk
    precision: str = "float32"  # of the probabilities while they are kept: float32 or float16
    probabilities: bool = False  # also write <case>_probability.nii.gz
    uncertainty: bool = False  # also write <case>_uncertainty.nii.gz, bits
    device: str = "auto"
    residuals: ResidualsConfig = field(default_factory=ResidualsConfig)


@dataclass
class EvaluateConfig:
    """grcsf evaluate."""

    cases: int = 20  # whose slices evaluation.html shows, the lowest Dice first
    lesion_labels: tuple[int, ...] | None = None  # label values merged to the lesion; null: 1


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in plain YAML and JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


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


def from_dict(cls: type[Config], values: Any, where: str) -> Config:
    """A configuration of class ``cls`` from plain types; ``where`` names the source in errors.

    Raises:
        InputError: a key that does not exist, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise InputError(where, f"holds {values!r}", "expected a mapping of settings")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise InputError(
            where, f"unknown setting {unknown[0]!r}", f"expected one of {', '.join(hints)}"
        )
    parsed = {key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    return cls(**parsed)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        length = None if kinds[-1] is Ellipsis else len(kinds)
        fits = isinstance(value, list | tuple) and length in (None, len(value))
        if not fits:
            count = "a list" if length is None else f"a list of {length}"
            raise InputError(where, f"is {value!r}", f"expected {count}")
        return tuple(_value(kinds[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(where, f"is {value!r}", f"expected {hint.__name__}")
    return value


_POSITIVE = (
    *("epochs", "steps_per_epoch", "batch_size", "learning_rate", "clip_norm", "patch_size"),
    *("crop_size", "spacing", "validation_every", "draws", "accumulate_batches", "timeout_minutes"),
    "position_base",
)
_SHARES = (
    *("foreground", "validation_fraction", "overlap", "threshold", "mask_ratios", "ema_decay"),
    *("brightness", "contrast", "rcu_threshold"),
)
_NOT_NEGATIVE = (
    *("cache_gb", "weight_decay", "warmup_epochs", "workers", "checkpoint_every", "overlays"),
    *("rotation", "noise", "folds", "fold", "cases", "memory_gb", "min_lesion_mm3"),
)
_RANGES = ("scaling", "gamma", "blur", "low_resolution")
_MAY_BE_EMPTY = ("rcu_levels", "channel_windows", "mirror_axes")


def check(config: Any, where: str = "") -> None:
    """Look over the numbers of a configuration.

    Raises:
        InputError: one is out of its range; the message names the setting.
    """
    for entry in dataclasses.fields(config):
        name, value = f"{where}{entry.name}", getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
            continue
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () and entry.name not in _MAY_BE_EMPTY:
            raise InputError(name, "is an empty list", "expected at least one value")
        if entry.name in _POSITIVE and any(number <= 0 for number in numbers):
            raise InputError(name, f"is {value}", "expected above 0")
        share = entry.name in _SHARES or entry.name.endswith("_probability")
        if share and any(not 0 <= number <= 1 for number in numbers):
            raise InputError(name, f"is {value}", "expected from 0 to 1")
        if entry.name in ("overlap", "validation_fraction", "ema_decay") and value >= 1:
            raise InputError(name, f"is {value}", "expected below 1")
        if entry.name in ("threshold", "mask_ratios") and any(n in (0, 1) for n in numbers):
            raise InputError(name, f"is {value}", "expected between 0 and 1")
        if entry.name in _NOT_NEGATIVE and any(number < 0 for number in numbers):
            raise InputError(name, f"is {value}", "expected 0 or more")
        if entry.name == "mirror_axes" and not (set(value) <= {0, 1, 2}):
            raise InputError(name, f"is {value}", "expected axes among 0, 1 and 2")
        if entry.name == "accumulate" and value not in ("auto", "device", "cpu", "disk"):
            raise InputError(name, f"is {value!r}", "expected auto, device, cpu or disk")
        kept = entry.name == "precision" and isinstance(config, PredictConfig | ResidualsConfig)
        if kept and value not in ("float32", "float16"):
            raise InputError(name, f"is {value!r}", "expected float32 or float16")
        windows = {"window": (value,), "channel_windows": value}.get(entry.name, ())
        if any(not low < high for low, high in windows):
            raise InputError(name, f"is {value}", "expected the lower bound first")
        if entry.name in _RANGES and not 0 < value[0] <= value[1]:
            raise InputError(name, f"is {value}", "expected two values above 0, the lower first")
        if entry.name == "low_resolution" and value[1] > 1:
            raise InputError(name, f"is {value}", "expected at most 1")
        if entry.name == "folds" and value == 1:
            raise InputError(name, "is 1", "expected 0 or at least 2")
        if entry.name == "fold" and value and not config.folds and config.splits_file is None:
            raise InputError(name, f"is {value}", "set folds or splits_file as well")
        if entry.name == "folds" and value and not config.fold < value:
            raise InputError(f"{where}fold", f"is {config.fold}", f"expected below folds, {value}")


def load_config(cls: type[Config], path: Path) -> Config:
    """Read a YAML file; settings that it leaves out keep their defaults.

    Raises:
        InputError: the file can't be read, or a setting is unknown or of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise InputError(path, f"can't be read ({problem})", "expected a YAML file") from error
    return from_dict(cls, {} if values is None else values, str(path))


def dump_config(config: Any) -> str:
    """The YAML text of a configuration, every setting in it."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def save_config(config: Any, path: Path) -> None:
    """Write a configuration as YAML, whole."""
    write_whole(path, lambda temporary: temporary.write_text(dump_config(config)))

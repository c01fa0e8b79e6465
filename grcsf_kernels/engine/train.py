# SPDX-License-Identifier: Apache-2.0
"""Training of the segmentation network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from monai.inferers import sliding_window_inference
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from rich.progress import track
from torch import Tensor, nn

from grcsf_kernels.engine.checkpoint import save_checkpoint
from grcsf_kernels.engine.config import TrainConfig, check, run_identity, save_config
from grcsf_kernels.engine.data import (
    Case,
    Preprocessing,
    Sample,
    Samples,
    find_cases,
    load_sample,
    mirrors,
)
from grcsf_kernels.engine.distributed import launch, on_first
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.loader import MicroBatch, one_thread
from grcsf_kernels.engine.logs import Logs
from grcsf_kernels.engine.loop import Task, fit, saving, seed_of
from grcsf_kernels.engine.losses import DiceFocal
from grcsf_kernels.engine.metrics import dice
from grcsf_kernels.engine.report import Report, console
from grcsf_kernels.models import GRCSF


def train(
    data: Path,
    output: Path,
    config: TrainConfig,
    residuals: Path | None = None,
    report: Report | None = None,
) -> Path:
    """Train GRCSF, or its backbone, on the cases of a folder.

    Goes on from the last state where ``output`` holds a run with the same settings. With validation
    cases the epoch with the best validation Dice is kept, without them the last one. Under
    ``torchrun`` every process calls it, and the first one writes.

    Args:
        data: a folder of images with labels; see :func:`grcsf_kernels.engine.data.find_cases`.
        output: gets ``model.safetensors``, the settings, the training state and TensorBoard logs.
        config: settings.
        residuals: the folder of :func:`grcsf_kernels.engine.cache_residuals`; needed with
            ``model.use_rcu``.
        report: takes the cases that can't be used; None: only printed.

    Returns:
        The model file.

    Raises:
        InputError: no case can be used, or a setting that does not fit.
    """
    report = Report() if report is None else report
    check(config)
    if config.model.use_rcu and residuals is None:
        raise InputError(
            "residuals", "missing", "run grcsf residuals first, or set model.use_rcu to false"
        )
    fabric = launch(config.optimization)
    samples = _load(data, config, residuals if config.model.use_rcu else None, report)
    training, validation = _split(samples, config)
    residual = samples[0].residual
    maps = 0 if residual is None else residual.shape[0]
    seed = config.optimization.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, max(maps, 1))
    on_first(fabric, lambda: save_config(config, Path(output) / "train.yaml"))
    criterion = DiceFocal()
    path = Path(output) / "model.safetensors"
    logs = Logs(Path(output) / "logs", enabled=fabric.is_global_zero)

    def parts(network: nn.Module, batch: MicroBatch) -> Tensor:
        image, label, residual = batch.crops.split([1, 1, maps], dim=1)
        logits = network(image, residual if maps else None)
        return criterion.parts(logits, label, batch.share)

    def keep(network: nn.Module) -> None:
        with saving(path):
            save_checkpoint(path, network, config.data, config.crop_size)

    def epoch_done(network: nn.Module, epoch: int, best: float) -> float:
        last = epoch + 1 == config.optimization.epochs
        if not validation:
            keep(network)
            return best
        if last or (epoch + 1) % config.validation_every == 0:
            network.to(fabric.device)
            score = _validate(network, validation, config, logs, epoch)
            logs.number("validation dice", score, epoch)
            if score > best or not path.exists():
                keep(network)
                return score
        return best

    # One by one: a crop is a function of its place among all crops, whatever the batch it is in.
    one = dataclasses.replace(config.optimization, batch_size=1)
    fit(
        model,
        Task(
            LesionCrops(training, dataclasses.replace(config, optimization=one), seed),
            parts,
            criterion.loss,
            epoch_done,
        ),
        config.optimization,
        fabric=fabric,
        state_path=path.with_suffix(".state"),
        identity=run_identity(config, samples.names, fabric.world_size),
        title="GRCSF" if config.model.use_gcu or config.model.use_rcu else "backbone",
        log=logs.number,
    )
    return path


def build(config: TrainConfig, num_maps: int) -> GRCSF:
    """The network of a configuration, with fresh weights."""
    model = config.model
    try:
        return GRCSF(
            1,
            1,
            num_maps=num_maps,
            channels=model.channels,
            blocks_per_level=model.blocks_per_level,
            rcu_levels=model.rcu_levels,
            num_heads=model.num_heads,
            head_dim=model.head_dim,
            patch_size=model.patch_size,
            reduction=model.reduction,
            compensation=model.compensation,
            score_channels=model.score_channels,
            use_gcu=model.use_gcu,
            use_rcu=model.use_rcu,
            deep_supervision=model.deep_supervision,
        )
    except ValueError as error:
        raise InputError("model", str(error), "correct the setting") from error


def _load(data: Path, config: TrainConfig, residuals: Path | None, report: Report) -> Samples:
    preprocessing = Preprocessing(config.data)

    def load(case: Case) -> Sample:
        with one_thread():
            return load_sample(case, preprocessing, labels=True, residuals=residuals)

    samples = Samples(load, config.optimization.cache_gb * 1e9)
    expected: int | None = None
    cases = find_cases(data, report, labels=True)
    for case in track(cases, "reading", console=console, disable=console.quiet):
        try:
            sample = load(case)
        except InputError as error:
            report.skip(case.image, str(error))
            continue
        if sample.residual is not None:
            found = sample.residual.shape[0]
            expected = found if expected is None else expected
            if found != expected:
                report.skip(
                    case.image,
                    f"{case.image}: has {found} residual maps and the others {expected}; "
                    "run grcsf residuals on all cases again",
                )
                continue
        samples.add(case, sample)
    if not samples:
        raise InputError(data, "no case can be used", "see the reasons above")
    return samples


def _split(samples: Samples, config: TrainConfig) -> tuple[Samples, Samples]:
    """Training and validation cases: a shuffle that follows from the seed."""
    held = int(len(samples) * config.validation_fraction)
    generator = torch.Generator().manual_seed(seed_of(config.optimization.seed, 1))
    order = torch.randperm(len(samples), generator=generator).tolist()
    return samples.subset(order[held:]), samples.subset(order[:held])


@torch.no_grad()
def _validate(
    network: nn.Module, samples: Samples, config: TrainConfig, logs: Logs, epoch: int
) -> float:
    device = next(network.parameters()).device
    scores = []
    for index in range(len(samples)):
        sample = samples[index]
        logits = predict_logits(network, sample.image, sample.residual, config.crop_size, device)
        assert sample.label is not None
        predicted, label = (logits[0] > 0).numpy(), sample.label[0].numpy() > 0
        scores.append(dice(predicted, label))
        if index < config.overlays:
            image = sample.image.as_tensor()[0].numpy()
            logs.overlay(sample.case.name, image, label, predicted, epoch)
    return sum(scores) / len(scores)


def predict_logits(
    network: nn.Module,
    image: Tensor,
    residual: Tensor | None,
    crop_size: tuple[int, int, int],
    device: torch.device,
    overlap: float = 0.5,
) -> Tensor:
    """Logits [1, *S] on the CPU of an image [1, *S] and maps [K, *S], in blended windows."""
    parts = [torch.as_tensor(image).as_subclass(Tensor)] + ([] if residual is None else [residual])

    def run(window: Tensor) -> Tensor:
        maps = window[:, 1:] if residual is not None else None
        return network(window[:, :1], maps).float()

    logits = sliding_window_inference(
        torch.cat(parts)[None],
        crop_size,
        sw_batch_size=2,
        predictor=run,
        overlap=overlap,
        mode="gaussian",
        sw_device=device,
        device=torch.device("cpu"),
    )
    return torch.as_tensor(logits)[0]


class LesionCrops:
    """Batches of augmented crops, mostly around lesions: a function of (epoch, step) and the seed.

    Image, label and residual maps go through the same spatial transforms.
    """

    def __init__(self, samples: Samples, config: TrainConfig, seed: int) -> None:
        self._samples, self._batch, self._seed = samples, config.optimization.batch_size, seed
        keys = ["image", "label"] + ([] if samples[0].residual is None else ["residual"])
        self._keys = keys
        self._transform = Compose(
            [
                SpatialPadd(keys, config.crop_size),
                # Around the voxel first, then the crop anywhere in there: were the lesion always at
                # the center, a network would learn the place and not the lesion.
                RandCropByPosNegLabeld(
                    keys,
                    label_key="label",
                    spatial_size=[size * 3 // 2 for size in config.crop_size],
                    pos=config.foreground,
                    neg=1 - config.foreground,
                    num_samples=1,
                    allow_smaller=True,
                ),
                RandSpatialCropd(keys, config.crop_size, random_size=False),
                *mirrors(keys, config.mirror_axes),
                RandScaleIntensityd(["image"], factors=0.1, prob=0.5),
                RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
            ]
        )

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, str]:
        """[B, 1 + 1 + K, *crop]: image, label, maps; and the names of the cases."""
        seed = seed_of(self._seed, epoch, step, 2)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self._samples), (self._batch,), generator=generator).tolist()
        self._transform.set_random_state(seed=seed)
        crops = []
        for pick in picks:
            sample = self._samples[pick]
            parts = {key: torch.as_tensor(getattr(sample, key)) for key in self._keys}
            (crop,) = self._transform({k: v.as_subclass(Tensor) for k, v in parts.items()})
            crops.append(
                torch.cat([torch.as_tensor(crop[key]).as_subclass(Tensor) for key in self._keys])
            )
        return torch.stack(crops), ", ".join(self._samples.names[i] for i in picks)

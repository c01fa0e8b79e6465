# SPDX-License-Identifier: Apache-2.0
"""Training of the segmentation network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from grcsf_kernels.common.atomic_files import saving
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import check, to_dict
from grcsf_kernels.engine.config import TrainConfig, run_identity, save_config
from grcsf_kernels.engine.data.cache import CachedCases
from grcsf_kernels.engine.data.crops import LesionCrops
from grcsf_kernels.engine.data.samples import (
    Preprocessing,
    Sample,
    Samples,
    load_sample,
    read_samples,
)
from grcsf_kernels.engine.data.splits import save_split, split
from grcsf_kernels.engine.diagnosis import NotFiniteError
from grcsf_kernels.engine.evaluation.metrics import dice
from grcsf_kernels.engine.inference.sliding_window import predict_logits
from grcsf_kernels.engine.io.datasets import Case, find_cases, residual_path
from grcsf_kernels.engine.io.provenance import CachedMaps
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.training.distributed import launch, on_first, only_run
from grcsf_kernels.engine.training.losses import DiceFocal
from grcsf_kernels.engine.training.steps import MicroBatch, one_thread
from grcsf_kernels.engine.training.tensorboard import Logs
from grcsf_kernels.engine.training.trainer import Objective, expect_own_states, fit
from grcsf_kernels.models import GRCSF
from grcsf_kernels.models.files import save_checkpoint


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
        data: a folder of images with labels; see :mod:`grcsf_kernels.engine.io.datasets`.
        output: gets ``model.safetensors``, the settings, the split (``split.json``), the training
            state and TensorBoard logs.
        config: settings.
        residuals: the folder of :func:`grcsf_kernels.engine.cache_residuals`; needed with
            ``model.use_rcu``.
        report: takes the cases that can't be used; None: only printed.

    Returns:
        The model file.

    Raises:
        InputError: no case can be used, a setting that does not fit, another run that writes to
            ``output`` or that left a state of other settings there, or what stops
            :func:`grcsf_kernels.engine.training.trainer.fit`.
    """
    report = Report() if report is None else report
    check(config)
    if config.model.use_rcu and residuals is None:
        raise InputError(
            "residuals", "missing", "run grcsf residuals first, or set model.use_rcu to false"
        )
    residuals = residuals if config.model.use_rcu else None
    fabric = launch(config.optimization)
    cached = None if residuals is None else CachedMaps(residuals)
    samples = _load(data, config, cached, report)
    training = _Training(Path(output), config, samples, cached, fabric)
    with only_run(fabric, output), training.logs:
        training.run()
    return training.path


class _Training:
    """One training: its cases, its network, and what is written of it."""

    def __init__(
        self,
        output: Path,
        config: TrainConfig,
        samples: Samples,
        cached: CachedMaps | None,
        fabric: Fabric,
    ) -> None:
        self.output, self.config, self.samples, self.fabric = output, config, samples, fabric
        self.divided = split(samples.cases, config)
        training, self.validation = (samples.subset(part) for part in self.divided)
        first = samples[0]
        self.channels = first.image.shape[0]
        self.maps = 0 if first.residual is None else first.residual.shape[0]
        self.made_by = None if cached is None else cached.description
        self.path = output / "model.safetensors"
        self.logs = Logs(output / "logs", enabled=fabric.is_global_zero)
        self.criterion = DiceFocal()
        seed = config.optimization.seed
        self.crops = LesionCrops(training, config, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build(config, max(self.maps, 1), self.channels)

    def run(self) -> None:
        """Train, from where a former call ended."""
        config, model = self.config, self.config.model
        state_path = self.path.with_suffix(".state")
        identity = run_identity(config, self.samples.names, self.fabric.world_size)
        # Nothing of the run that is there is overwritten before this one can go on from it.
        expect_own_states(self.fabric, {state_path: identity})
        on_first(self.fabric, self._describe)
        fit(
            self.model,
            Objective(self.crops, self._loss_terms, self.criterion.loss, self._epoch_done),
            config.optimization,
            fabric=self.fabric,
            state_path=state_path,
            identity=identity,
            title="GRCSF" if model.use_gcu or model.use_rcu else "backbone",
            log=self.logs.number,
        )

    def _describe(self) -> None:
        with saving(self.output):
            save_config(self.config, self.output / "train.yaml")
            save_split(self.output / "split.json", self.samples.cases, self.divided)

    def _loss_terms(self, network: nn.Module, batch: MicroBatch) -> Tensor:
        image, label, maps = batch.crops.split([self.channels, 1, self.maps], dim=1)
        logits = network(image, maps if self.maps else None)
        return self.criterion.parts(logits, label, batch.share)

    def _keep(self, network: nn.Module) -> None:
        with saving(self.path):
            config = self.config
            save_checkpoint(self.path, network, config.data, config.crop_size, self.made_by)

    def _epoch_done(self, network: nn.Module, epoch: int, best: float) -> float:
        last = epoch + 1 == self.config.optimization.epochs
        if not self.validation:
            self._keep(network)
            return best
        if last or (epoch + 1) % self.config.validation_every == 0:
            network.to(self.fabric.device)
            score = _validate(network, self.validation, self.config, self.logs, epoch)
            self.logs.number("validation dice", score, epoch)
            if score > best or not self.path.exists():
                self._keep(network)
                return score
        return best


def build(config: TrainConfig, num_maps: int, channels: int = 1) -> GRCSF:
    """The network of a configuration for images of ``channels``, with fresh weights."""
    model = config.model
    try:
        return GRCSF(
            channels,
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


def _load(data: Path, config: TrainConfig, cached: CachedMaps | None, report: Report) -> Samples:
    preprocessing = Preprocessing(config.data)
    residuals = None if cached is None else cached.folder

    def read(case: Case) -> Sample:
        with one_thread():
            return load_sample(
                case,
                preprocessing,
                labels=True,
                residuals=residuals,
                lesion_labels=config.lesion_labels,
            )

    load: Callable[[Case], Sample] = read
    if config.optimization.cache_dir is not None:
        load = CachedCases(
            read,
            Path(config.optimization.cache_dir),
            [to_dict(config.data), config.lesion_labels],
            None if residuals is None else functools.partial(residual_path, residuals),
        )
    cases = find_cases(
        data,
        report,
        labels=True,
        suffixes=config.data.bids_suffixes,
        lesion_labels=config.lesion_labels,
    )
    made_by = None if cached is None else cached.description
    maps = None if made_by is None else len(made_by["autoencoders"])

    def checked(case: Case) -> Sample:
        if cached is not None:
            cached.path(case)  # also of what comes from cache_dir
        return load(case)

    samples = read_samples(cases, checked, config.optimization.cache_gb * 1e9, report, maps)
    if not samples:
        raise InputError(data, "no case can be used", "see the reasons above")
    return samples


@torch.no_grad()
def _validate(
    network: nn.Module, samples: Samples, config: TrainConfig, logs: Logs, epoch: int
) -> float:
    device = next(network.parameters()).device
    scores = []
    for index in range(len(samples)):
        sample = samples[index]
        try:
            logits = predict_logits(
                network, sample.image, sample.residual, config.crop_size, device
            )
        except NotFiniteError as error:  # a NaN is no lesion, and the score would be one
            problem = f"{error.problem}, in the validation after epoch {epoch + 1}"
            raise InputError(sample.case.image, problem, error.remedy) from error
        assert sample.label is not None
        predicted, label = (logits[0] > 0).numpy(), sample.label[0].numpy() > 0
        scores.append(dice(predicted, label))
        if index < config.overlays:
            image = sample.image.as_tensor()[0].numpy()
            logs.overlay(sample.case.name, image, label, predicted, epoch)
    return sum(scores) / len(scores)

# SPDX-License-Identifier: Apache-2.0
"""Pretraining of the masked autoencoders, one for each mask ratio."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from grcsf_kernels.common.atomic_files import saving
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import check, to_dict
from grcsf_kernels.engine.config import PretrainConfig, run_identity, save_config
from grcsf_kernels.engine.data.cache import CachedCases
from grcsf_kernels.engine.data.crops import Crops
from grcsf_kernels.engine.data.samples import (
    Preprocessing,
    Sample,
    Samples,
    check_size,
    load_sample,
    read_samples,
)
from grcsf_kernels.engine.io.datasets import Case, find_cases
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.seeding import seed_of
from grcsf_kernels.engine.training.distributed import launch, on_first, only_run
from grcsf_kernels.engine.training.steps import MicroBatch, one_thread
from grcsf_kernels.engine.training.tensorboard import Logs
from grcsf_kernels.engine.training.trainer import Objective, expect_own_states, fit
from grcsf_kernels.masking import random_masks
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.models.files import save_checkpoint


def autoencoder_path(output: Path, mask_ratio: float) -> Path:
    """``mae_50.safetensors`` for a mask ratio of 0.5, ``mae_62.5.safetensors`` for 0.625."""
    return Path(output) / f"mae_{mask_ratio * 100:.6g}.safetensors"


def pretrain(
    data: Path, output: Path, config: PretrainConfig, report: Report | None = None
) -> list[Path]:
    """Train one masked autoencoder for each mask ratio on the images of a folder.

    Goes on from the last state where ``output`` holds a run with the same settings. Under
    ``torchrun`` every process calls it, and the first one writes.

    Args:
        data: a folder of images; see :func:`grcsf_kernels.engine.io.datasets.find_cases`.
        output: gets ``mae_<percent>.safetensors``, the settings and the training states.
        config: settings.
        report: takes the images that can't be used; None: only printed.

    Returns:
        The model files, in the order of the mask ratios.

    Raises:
        InputError: no image can be used, a setting that does not fit, another run that writes to
            ``output`` or that left a state of other settings there, or what stops
            :func:`grcsf_kernels.engine.training.trainer.fit`.
    """
    report = Report() if report is None else report
    check(config)
    model_config = config.model
    if any(c % p for c, p in zip(config.crop_size, model_config.patch_size, strict=True)):
        raise InputError(
            "crop_size",
            f"is {config.crop_size}",
            f"expected a multiple of model.patch_size {model_config.patch_size}",
        )
    if config.crop_size == model_config.patch_size:
        raise InputError("crop_size", "is a single patch", "expected at least two patches")
    names = [autoencoder_path(output, ratio).name for ratio in model_config.mask_ratios]
    if len(set(names)) < len(names):
        raise InputError(
            "model.mask_ratios",
            f"is {model_config.mask_ratios}",
            "expected ratios that differ: each has a file of its own",
        )
    fabric = launch(config.optimization)
    samples = _load(data, config, report)
    channels = samples[0].image.shape[0]
    trainings = [
        _Training(config, index, samples, channels, Path(output), fabric)
        for index in range(len(model_config.mask_ratios))
    ]

    def describe() -> None:
        with saving(output):
            save_config(config, Path(output) / "pretrain.yaml")

    with only_run(fabric, output):
        # Nothing of the run that is there is overwritten before this one can go on from it.
        expect_own_states(fabric, {one.state_path: one.identity for one in trainings})
        on_first(fabric, describe)
        for training in trainings:
            training.run()
    return [training.path for training in trainings]


class _Training:
    """Of the autoencoder of one mask ratio."""

    def __init__(
        self,
        config: PretrainConfig,
        index: int,
        samples: Samples,
        channels: int,
        output: Path,
        fabric: Fabric,
    ) -> None:
        self.config, self.output, self.fabric = config, output, fabric
        self.ratio = ratio = config.model.mask_ratios[index]
        self.path = autoencoder_path(output, ratio)
        self.state_path = self.path.with_suffix(".state")
        self.identity = run_identity(config, ratio, samples.names, fabric.world_size)
        self.seed = seed = seed_of(config.optimization.seed, index)
        self.crops = Crops(samples, config, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build(config, ratio, channels)

    def _parts(self, network: nn.Module, batch: MicroBatch) -> Tensor:
        sizes = zip(self.config.crop_size, self.config.model.patch_size, strict=True)
        patches = prod(size // patch for size, patch in sizes)
        generator = torch.Generator().manual_seed(seed_of(self.seed, batch.epoch, batch.step, 1))
        # Of all crops of the step, so that it does not matter which process has which.
        hidden = random_masks(batch.total, patches, self.ratio, 1, generator)[0]
        own = hidden[batch.first : batch.first + len(batch.crops)]
        loss, _, _ = network(batch.crops, own.to(batch.crops.device))
        return loss * batch.share

    def _epoch_done(self, network: nn.Module, epoch: int, best: float) -> float:
        with saving(self.path):
            save_checkpoint(self.path, network, self.config.data, self.config.crop_size)
        return best

    def run(self) -> None:
        """Train it, from where its state ends."""
        folder = self.output / "logs" / self.path.stem
        with Logs(folder, enabled=self.fabric.is_global_zero) as logs:
            fit(
                self.model,
                Objective(self.crops, self._parts, None, self._epoch_done),
                dataclasses.replace(self.config.optimization, seed=self.seed),
                fabric=self.fabric,
                state_path=self.state_path,
                identity=self.identity,
                title=f"autoencoder {self.ratio:.0%}",
                log=logs.number,
            )
        del self.model  # one at a time on the device


def build(config: PretrainConfig, ratio: float, channels: int = 1) -> MaskedAutoencoder:
    """The autoencoder of a configuration for images of ``channels``, with fresh weights."""
    model = config.model
    try:
        return MaskedAutoencoder(
            model.patch_size,
            channels,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            decoder_dim=model.decoder_dim,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            mask_ratio=ratio,
            normalized_target=model.normalized_target,
            position_base=model.position_base,
        )
    except ValueError as error:
        raise InputError("model", str(error), "correct the setting") from error


def _load(data: Path, config: PretrainConfig, report: Report) -> Samples:
    preprocessing = Preprocessing(config.data)

    def read(case: Case) -> Sample:
        return load_sample(case, preprocessing)

    folder = config.optimization.cache_dir
    cached = read if folder is None else CachedCases(read, Path(folder), to_dict(config.data))

    def load(case: Case) -> Sample:
        with one_thread():
            sample = cached(case)
        check_size(sample, config.model.patch_size, "the autoencoder's patch")
        return sample

    cases = find_cases(data, report, labels=False, suffixes=config.data.bids_suffixes)
    samples = read_samples(cases, load, config.optimization.cache_gb * 1e9, report)
    if not samples:
        raise InputError(data, "no image can be used", "see the reasons above")
    return samples

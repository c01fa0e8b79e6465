# SPDX-License-Identifier: Apache-2.0
"""Pretraining of the masked autoencoders, one for each mask ratio."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import torch
from monai.transforms import Compose, RandSpatialCropd, SpatialPadd
from rich.progress import track
from torch import Tensor, nn

from grcsf_kernels.engine.checkpoint import save_checkpoint
from grcsf_kernels.engine.config import PretrainConfig, check, run_identity, save_config
from grcsf_kernels.engine.data import (
    Case,
    Preprocessing,
    Sample,
    Samples,
    check_size,
    find_cases,
    load_sample,
    mirrors,
)
from grcsf_kernels.engine.distributed import launch, on_first
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.loader import MicroBatch, one_thread
from grcsf_kernels.engine.logs import Logs
from grcsf_kernels.engine.loop import Task, fit, saving, seed_of
from grcsf_kernels.engine.report import Report, console
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.nn.masking import random_masks


def autoencoder_path(output: Path, mask_ratio: float) -> Path:
    """``mae_50.safetensors`` for a mask ratio of 0.5."""
    return Path(output) / f"mae_{round(mask_ratio * 100)}.safetensors"


def pretrain(
    data: Path, output: Path, config: PretrainConfig, report: Report | None = None
) -> list[Path]:
    """Train one masked autoencoder for each mask ratio on the images of a folder.

    Goes on from the last state where ``output`` holds a run with the same settings. Under
    ``torchrun`` every process calls it, and the first one writes.

    Args:
        data: a folder of images; see :func:`grcsf_kernels.engine.data.find_cases`.
        output: gets ``mae_<percent>.safetensors``, the settings and the training states.
        config: settings.
        report: takes the images that can't be used; None: only printed.

    Returns:
        The model files, in the order of the mask ratios.

    Raises:
        InputError: no image can be used, or a setting that does not fit.
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
    fabric = launch(config.optimization)
    samples = _load(data, config, report)
    on_first(fabric, lambda: save_config(config, Path(output) / "pretrain.yaml"))
    paths = []
    for index, ratio in enumerate(model_config.mask_ratios):
        path = autoencoder_path(output, ratio)
        seed = seed_of(config.optimization.seed, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(config, ratio)
        optimization = dataclasses.replace(config.optimization, seed=seed)
        # One by one: a crop is a function of its place among all crops, whatever its batch.
        one = dataclasses.replace(optimization, batch_size=1)
        logs = Logs(Path(output) / "logs" / path.stem, enabled=fabric.is_global_zero)

        def parts(
            network: nn.Module, batch: MicroBatch, seed: int = seed, ratio: float = ratio
        ) -> Tensor:
            sizes = zip(config.crop_size, model_config.patch_size, strict=True)
            patches = prod(size // patch for size, patch in sizes)
            generator = torch.Generator().manual_seed(seed_of(seed, batch.epoch, batch.step, 1))
            # Of all crops of the step, so that it does not matter which process has which.
            hidden = random_masks(batch.total, patches, ratio, 1, generator)[0]
            own = hidden[batch.first : batch.first + len(batch.crops)]
            loss, _, _ = network(batch.crops, own.to(batch.crops.device))
            return loss * batch.share

        def epoch_done(network: nn.Module, epoch: int, best: float, path: Path = path) -> float:
            with saving(path):
                save_checkpoint(path, network, config.data, config.crop_size)
            return best

        fit(
            model,
            Task(
                Crops(samples, dataclasses.replace(config, optimization=one), seed),
                parts,
                None,
                epoch_done,
            ),
            optimization,
            fabric=fabric,
            state_path=path.with_suffix(".state"),
            identity=run_identity(config, ratio, samples.names, fabric.world_size),
            title=f"autoencoder {ratio:.0%}",
            log=logs.number,
        )
        paths.append(path)
    return paths


def _build(config: PretrainConfig, ratio: float) -> MaskedAutoencoder:
    model = config.model
    try:
        return MaskedAutoencoder(
            model.patch_size,
            1,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            decoder_dim=model.decoder_dim,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            mask_ratio=ratio,
            normalized_target=model.normalized_target,
        )
    except ValueError as error:
        raise InputError("model", str(error), "correct the setting") from error


def _load(data: Path, config: PretrainConfig, report: Report) -> Samples:
    preprocessing = Preprocessing(config.data)

    def load(case: Case) -> Sample:
        with one_thread():
            sample = load_sample(case, preprocessing)
        check_size(sample, config.model.patch_size, "the autoencoder's patch")
        return sample

    samples = Samples(load, config.optimization.cache_gb * 1e9)
    cases = find_cases(data, report, labels=False)
    for case in track(cases, "reading", console=console, disable=console.quiet):
        try:
            sample = load(case)
        except InputError as error:
            report.skip(case.image, str(error))
        else:
            samples.add(case, sample)
    if not samples:
        raise InputError(data, "no image can be used", "see the reasons above")
    return samples


class Crops:
    """Batches of random crops: a function of (epoch, step) and the seed."""

    def __init__(self, samples: Samples, config: PretrainConfig, seed: int) -> None:
        self._samples, self._batch, self._seed = samples, config.optimization.batch_size, seed
        keys = ["image"]
        crop = RandSpatialCropd(keys, config.crop_size, random_size=False)
        self._transform = Compose(
            [SpatialPadd(keys, config.crop_size), crop, *mirrors(keys, config.mirror_axes)]
        )

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, str]:
        """Images [B, 1, *crop] and the names of their cases."""
        seed = seed_of(self._seed, epoch, step, 0)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self._samples), (self._batch,), generator=generator).tolist()
        self._transform.set_random_state(seed=seed)
        images = [
            self._transform({"image": self._samples[i].image.as_tensor()})["image"] for i in picks
        ]
        stacked = torch.stack([torch.as_tensor(image).as_subclass(Tensor) for image in images])
        return stacked, ", ".join(self._samples.names[i] for i in picks)

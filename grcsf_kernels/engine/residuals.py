# SPDX-License-Identifier: Apache-2.0
"""Residual maps of whole volumes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from torch import Tensor

from grcsf_kernels.engine.checkpoint import Checkpoint, load_checkpoint
from grcsf_kernels.engine.config import ResidualsConfig, check
from grcsf_kernels.engine.data import (
    Case,
    Preprocessing,
    check_channels,
    check_size,
    find_cases,
    load_sample,
    residual_path,
)
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.loop import make_fabric, seed_of
from grcsf_kernels.engine.provenance import describe_maps, save_maps
from grcsf_kernels.engine.report import Report, for_each
from grcsf_kernels.engine.volumes import write_volume
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.nn import ResidualMaps
from grcsf_kernels.nn.masking import masks_per_round
from grcsf_kernels.nn.residual_maps import rescale


class VolumeMaps:
    """Residual maps of volumes of any size, in overlapping windows of the autoencoders' crop.

    The windows are blended before the maps are rescaled, once for the whole volume: rescaling each
    window by its own range would leave seams.

    Args:
        paths: model files of the autoencoders, one for each map.
        config: settings.

    Raises:
        InputError: a file that is no autoencoder, or autoencoders that were trained differently.
    """

    def __init__(self, paths: Sequence[Path], config: ResidualsConfig) -> None:
        if not paths:
            raise InputError("autoencoders", "none were given", "name the files of grcsf pretrain")
        loaded = [(load_checkpoint(path, "MaskedAutoencoder"), path) for path in paths]
        # By mask ratio, whatever the order of the arguments: a network knows its maps by place.
        loaded.sort(key=lambda pair: _autoencoder(pair[0]).mask_ratio)
        checkpoints = [checkpoint for checkpoint, _ in loaded]
        first = checkpoints[0]
        for checkpoint, path in loaded:
            if (checkpoint.data, checkpoint.crop_size) != (first.data, first.crop_size):
                raise InputError(
                    path,
                    f"was trained with other preprocessing or crops than {loaded[0][1]}",
                    "use autoencoders of one grcsf pretrain",
                )
        self.data = first.data
        self.patch = _autoencoder(first).patch_size
        self.channels = _autoencoder(first).in_channels
        self.description = describe_maps([c.model for c in checkpoints], config)
        self._crop, self._config = first.crop_size, config
        try:
            self._maps = ResidualMaps(
                [checkpoint.model for checkpoint in checkpoints],
                [_autoencoder(checkpoint).mask_ratio for checkpoint in checkpoints],
                config.draws,
                config.masking,
            )
            self._check_masks()
        except ValueError as error:
            raise InputError("residuals", str(error), "correct the setting") from error
        self._device = make_fabric(config.device).device
        self._maps.to(self._device)

    def _check_masks(self) -> None:
        """ValueError where a crop has too few patches for the masks."""
        patches = math.prod(c // p for c, p in zip(self._crop, self.patch, strict=True))
        if self._config.masking == "complementary":
            need = max(masks_per_round(ratio) for ratio in self._maps.mask_ratios)
            if patches < need:
                raise ValueError(f"a crop has {patches} patches, and the masks need {need}")

    def __call__(self, image: MetaTensor, name: str) -> Tensor:
        """Maps [K, *S] in [0, 1] of a preprocessed image [C, *S]; masks follow from the name."""
        seed = seed_of(self._config.seed, zlib.crc32(name.encode()))
        generator = torch.Generator().manual_seed(seed)
        raw = sliding_window_inference(
            image.as_tensor()[None],
            self._crop,
            sw_batch_size=1,
            predictor=lambda window: self._maps.raw(window, generator),
            overlap=self._config.overlap,
            mode="gaussian",
            sw_device=self._device,
            device=torch.device("cpu"),
        )
        return rescale(torch.as_tensor(raw))[0]


def _autoencoder(checkpoint: Checkpoint) -> MaskedAutoencoder:
    assert isinstance(checkpoint.model, MaskedAutoencoder)
    return checkpoint.model


def cache_residuals(
    data: Path,
    autoencoders: Sequence[Path],
    output: Path,
    config: ResidualsConfig,
    report: Report | None = None,
) -> Report:
    """Write the residual maps of every image of a folder.

    Args:
        data: a folder of images, or one image.
        autoencoders: model files, one for each map.
        output: gets ``<case>_residual.nii.gz``: 4D float32, one map after the other, in the
            image's own space; and ``residuals.json``, which says what made them.
        config: settings.
        report: takes what was done and skipped; None: a new one.

    Returns:
        The report.

    Raises:
        InputError: no image, or autoencoders that can't be used.
    """
    report = Report() if report is None else report
    check(config)
    maps = VolumeMaps(autoencoders, config)
    preprocessing = Preprocessing(maps.data)

    def work(case: Case) -> Path:
        sample = load_sample(case, preprocessing)
        check_channels(sample, maps.channels, "the autoencoders take")
        check_size(sample, maps.patch, "the autoencoder's patch")
        restored = preprocessing.restore(maps(sample.image, case.name), sample.image)
        path = residual_path(output, case)
        return write_volume(path, restored.astype(np.float32), sample.volume)

    cases = find_cases(data, report, labels=False, suffixes=maps.data.bids_suffixes)
    save_maps(output, maps.description)
    for_each(cases, work, report, "residual maps")
    return report

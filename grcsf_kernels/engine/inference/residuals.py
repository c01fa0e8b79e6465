# SPDX-License-Identifier: Apache-2.0
"""Residual maps of whole volumes."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grcsf_kernels.common.atomic_files import remove_leftovers
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.finite import is_finite
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine.buffers import Scratch, slabs
from grcsf_kernels.engine.config import ResidualsConfig
from grcsf_kernels.engine.data.resampling import load_placed
from grcsf_kernels.engine.data.samples import Preprocessing, check_channels, check_size
from grcsf_kernels.engine.diagnosis import NotFiniteError, cause_named
from grcsf_kernels.engine.identity import unlike
from grcsf_kernels.engine.inference.sharding import shard, wait_for_others
from grcsf_kernels.engine.inference.sliding_window import (
    SlidingWindow,
    inference_device,
    report_out_of_memory,
)
from grcsf_kernels.engine.io.datasets import Case, find_cases, residual_path
from grcsf_kernels.engine.io.fingerprint import Fingerprint, is_finished
from grcsf_kernels.engine.io.nifti import write_volume
from grcsf_kernels.engine.io.provenance import describe_maps, save_maps
from grcsf_kernels.engine.model_files import Checkpoint, load_checkpoint
from grcsf_kernels.engine.report import Report, for_each
from grcsf_kernels.engine.seeding import seed_of
from grcsf_kernels.masking import masks_per_round
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.nn import ResidualMaps


class VolumeMaps:
    """Residual maps of volumes of any size, in overlapping windows of the autoencoders' crop.

    The windows are blended before the maps are rescaled, once for the whole volume: rescaling each
    window by its own range would leave seams.

    Args:
        paths: model files of the autoencoders, one for each map.
        config: settings.

    Attributes:
        paths: the files in the order of the maps, by mask ratio.
        description: what makes the maps (:func:`describe_maps`).
        data: the preprocessing of the autoencoders.
        patch: of the autoencoders, voxels per axis.
        channels: of the images that they take.

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
            differ = [unlike(checkpoint.data, first.data)] if checkpoint.data != first.data else []
            for name, found, other in (
                ("crop_size", checkpoint.crop_size, first.crop_size),
                ("channels", *(_autoencoder(c).in_channels for c in (checkpoint, first))),
            ):
                differ += [f"{name} {found}, not {other}"] if found != other else []
            if differ:
                raise InputError(
                    path,
                    f"was trained otherwise than {loaded[0][1]}: {', '.join(differ)}",
                    "use autoencoders of one grcsf pretrain",
                )
        self.data = first.data
        self.patch = _autoencoder(first).patch_size
        self.channels = _autoencoder(first).in_channels
        self.description = describe_maps([c.model for c in checkpoints], config)
        self.paths = [path for _, path in loaded]
        self._names = " or ".join(str(path) for path in self.paths)
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
        self._device = inference_device(config.device)
        self._maps.to(self._device)

    def _check_masks(self) -> None:
        """ValueError where a crop has too few patches for the masks."""
        patches = math.prod(c // p for c, p in zip(self._crop, self.patch, strict=True))
        if self._config.masking == "complementary":
            need = max(masks_per_round(ratio) for ratio in self._maps.mask_ratios)
            if patches < need:
                raise ValueError(f"a crop has {patches} patches, and the masks need {need}")

    def __call__(self, image: Tensor, name: str, scratch: Scratch | None = None) -> Tensor:
        """Maps [K, *S] in [0, 1] of a preprocessed image.

        Args:
            image: [C, *S].
            name: of the case. The masks of each window follow from it, from the number of the
                window and from the seed, whatever else is computed.
            scratch: gives the memory for the maps; None: torch.

        Raises:
            MemoryError: there is no room for a window.
            NotFiniteError: an autoencoder gives NaN or Inf, or maps that ``precision`` can't hold.
        """
        config = self._config
        scratch = Scratch(Path(), "cpu", math.inf) if scratch is None else scratch
        image = torch.as_tensor(image).as_subclass(Tensor)
        count, space = len(self._maps.mask_ratios), image.shape[1:]
        maps = scratch.results(count, space, config.precision, self._device)
        ranges: list[Tensor] = []

        def predictor(window: Tensor, numbers: Sequence[int]) -> Tensor:
            seed = seed_of(config.seed, zlib.crc32(os.fsencode(name)), *numbers)
            return self._maps.raw(window, torch.Generator().manual_seed(seed))

        def take(planes: slice, values: Tensor) -> None:
            ranges.append(torch.stack(values.flatten(1).aminmax(dim=1)))
            maps[..., planes] = values.to(maps.device)

        # Windows one by one: the draws of a window are a batch already.
        windows = SlidingWindow(
            self._crop,
            config.overlap,
            1,
            self._device,
            scratch.sums_on(self._device),
            config.skip_air,
        )
        with cause_named(self._names, self._maps, {"image": image}):
            windows(predictor, [image], count, take, scratch.release)
        found = torch.stack(ranges)
        _rescale(maps, found[:, 0].amin(0), found[:, 1].amax(0), scratch)
        return maps


def _rescale(maps: Tensor, low: Tensor, high: Tensor, scratch: Scratch) -> None:
    """What :func:`grcsf_kernels.nn.residual_maps.rescale` does, in place and in slabs."""
    for index in range(maps.shape[0]):
        span = (high - low)[index].to(maps.device)
        for planes in slabs(maps[0, :, :, 0].numel(), maps.shape[-1]):
            slab = maps[index, ..., planes]
            scaled = (slab.float() - low[index].to(maps.device)) / span
            # Maps in float16 before they are rescaled have a largest number.
            if not is_finite(scaled) and span != 0:
                raise NotFiniteError(
                    f"residual map {index + 1} reaches {float(high[index]):.3g} before it is "
                    "rescaled",
                    "set residuals.precision to float32, and look for extreme values in the image",
                )
            slab.copy_(scaled if span != 0 else torch.zeros_like(scaled))
            scratch.release()


def _autoencoder(checkpoint: Checkpoint) -> MaskedAutoencoder:
    assert isinstance(checkpoint.model, MaskedAutoencoder)
    return checkpoint.model


def cache_residuals(
    data: Path,
    autoencoders: Sequence[Path],
    output: Path,
    config: ResidualsConfig,
    report: Report | None = None,
    *,
    overwrite: bool = False,
) -> Report:
    """Write the residual maps of every image of a folder.

    Cases and processes as in :func:`grcsf_kernels.engine.predict`: what is finished is kept, and
    with ``RANK`` and ``WORLD_SIZE`` each process does its share.

    Args:
        data: a folder of images, or one image.
        autoencoders: model files, one for each map.
        output: gets ``<case>_residual.nii.gz``: 4D float32, one map after the other, in the
            image's own space; and ``residuals.json``, which says what made them.
        config: settings.
        report: takes what was done and skipped; None: a new one.
        overwrite: make finished cases again.

    Returns:
        The report.

    Raises:
        InputError: no image, or autoencoders that can't be used.
    """
    report = Report() if report is None else report
    check(config)
    maps = VolumeMaps(autoencoders, config)
    preprocessing = Preprocessing(maps.data)

    fingerprint = Fingerprint(config, maps.paths)
    Path(output).mkdir(parents=True, exist_ok=True)
    found = find_cases(data, report, labels=False, suffixes=maps.data.bids_suffixes)
    cases = shard(found)
    save_maps(output, maps.description | {"run": fingerprint.run})

    @report_out_of_memory
    def work(case: Case) -> Path:
        path = residual_path(output, case)
        description = fingerprint.of(case.name, case.images)
        if not overwrite and is_finished([path], description):
            return path
        remove_leftovers(path)
        scratch = Scratch(output, config.accumulate, config.memory_gb * 1e9)
        sample, placement = load_placed(case, preprocessing, scratch)
        check_channels(sample, maps.channels, "the autoencoders take")
        check_size(sample, maps.patch, "the autoencoder's patch")
        found = maps(sample.image, case.name, scratch)
        restored = scratch.image((*sample.volume.array.shape, found.shape[0]))
        placement.fill(found, [(restored, lambda values: values)], scratch.release)
        return write_volume(path, restored, sample.volume, description)

    for_each(cases, work, report, "residual maps")
    wait_for_others()
    return report

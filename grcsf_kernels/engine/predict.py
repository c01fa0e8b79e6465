# SPDX-License-Identifier: Apache-2.0
"""Segmentation of images with a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from grcsf_kernels.engine.checkpoint import load_checkpoint
from grcsf_kernels.engine.config import PredictConfig, check
from grcsf_kernels.engine.data import (
    Case,
    Preprocessing,
    check_channels,
    check_size,
    find_cases,
    load_sample,
)
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.loop import make_fabric
from grcsf_kernels.engine.provenance import compare_maps, read_maps
from grcsf_kernels.engine.report import Report, console, for_each
from grcsf_kernels.engine.residuals import VolumeMaps
from grcsf_kernels.engine.train import predict_logits
from grcsf_kernels.engine.volumes import write_volume
from grcsf_kernels.models import GRCSF


def predict(
    images: Path,
    checkpoint: Path,
    output: Path,
    config: PredictConfig,
    autoencoders: Sequence[Path] = (),
    residuals: Path | None = None,
    report: Report | None = None,
) -> Report:
    """Segment an image or the images of a folder.

    Args:
        images: one NIfTI file or a folder.
        checkpoint: the model file of :func:`grcsf_kernels.engine.train`.
        output: gets ``<case>_mask.nii.gz`` (uint8, 0 and 1) in the image's own space, and on
            request ``<case>_probability.nii.gz`` (float32).
        config: settings.
        autoencoders: model files that make the residual maps; for a network with an RCU, these or
            ``residuals``.
        residuals: the folder of :func:`grcsf_kernels.engine.cache_residuals`.
        report: takes what was done and skipped; None: a new one.

    Returns:
        The report.

    Raises:
        InputError: no image, or model files that can't be used.
    """
    report = Report() if report is None else report
    check(config)
    loaded = load_checkpoint(checkpoint, "GRCSF")
    model = loaded.model
    assert isinstance(model, GRCSF)
    maps = None
    if model.use_rcu and residuals is None:
        if not autoencoders:
            raise InputError(
                checkpoint,
                "has region compensation units and needs residual maps",
                "name the autoencoders (--autoencoder) or the cached maps (--residuals)",
            )
        maps = VolumeMaps(autoencoders, config.residuals)
        if maps.data != loaded.data:
            raise InputError(
                autoencoders[0],
                "was trained with other preprocessing than the segmentation model",
                "use the autoencoders that its residual maps came from",
            )
    if model.use_rcu:
        where = autoencoders[0] if residuals is None else residuals
        made_by = read_maps(where) if maps is None else maps.description
        for note in compare_maps(loaded.maps, made_by, where):
            console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    device = make_fabric(config.device).device
    model.to(device)
    preprocessing = Preprocessing(loaded.data)

    @torch.no_grad()
    def work(case: Case) -> Path:
        folder = residuals if model.use_rcu else None
        sample = load_sample(case, preprocessing, residuals=folder)
        check_channels(sample, int(model.config["in_channels"]), "the model takes")  # type: ignore[call-overload]
        if maps is not None:
            check_size(sample, maps.patch, "the autoencoder's patch")
            sample.residual = maps(sample.image, case.name)
        if sample.residual is not None and sample.residual.shape[0] != model.num_maps:
            raise InputError(
                case.image,
                f"has {sample.residual.shape[0]} residual maps, and the model takes "
                f"{model.num_maps}",
                "use the autoencoders that the model was trained with",
            )
        logits = predict_logits(
            model, sample.image, sample.residual, loaded.crop_size, device, config.overlap
        )
        probability = preprocessing.restore(torch.sigmoid(logits), sample.image)[..., 0]
        if config.probabilities:
            path = Path(output) / f"{case.name}_probability.nii.gz"
            write_volume(path, probability.astype(np.float32), sample.volume)
        mask = (probability >= config.threshold).astype(np.uint8)
        return write_volume(Path(output) / f"{case.name}_mask.nii.gz", mask, sample.volume)

    cases = find_cases(images, report, labels=False, suffixes=loaded.data.bids_suffixes)
    for_each(cases, work, report, "segmenting")
    return report

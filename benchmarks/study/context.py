# SPDX-License-Identifier: Apache-2.0
"""Whether an autoencoder looks at the image, or knows no more than a mean head by place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.transforms import ResizeWithPadOrCrop

from grcsf_kernels.engine.data.samples import Preprocessing, load_sample
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.report import Report
from grcsf_kernels.masking import complementary_masks, masks_per_round
from grcsf_kernels.models import MaskedAutoencoder


def context_errors(data: Path, autoencoders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Mean squared errors of hidden brain voxels, over their variance.

    ``own``: predicted from what is visible of the same subject. ``other``: from the same patches of
    another subject. An autoencoder that looks at the image is better with the first; one that knows
    a mean head is as good with either.

    Args:
        data: the subjects; the middle of each is taken, as large as the training crops.
        autoencoders: model files.

    Returns:
        Both by mask ratio.
    """
    found = {}
    for path in autoencoders:
        checkpoint = load_checkpoint(path, "MaskedAutoencoder")
        network = checkpoint.model
        assert isinstance(network, MaskedAutoencoder)
        preprocessing = Preprocessing(checkpoint.data)
        fit = ResizeWithPadOrCrop(checkpoint.crop_size)
        images = torch.stack(
            [
                torch.as_tensor(fit(load_sample(case, preprocessing).image))
                for case in find_cases(data, Report(), labels=False)
            ]
        )
        target, inside = network.target(images), network.patchify(images) != 0
        rounds = masks_per_round(network.mask_ratio)
        masks = complementary_masks(
            1, target.shape[1], network.mask_ratio, rounds, torch.Generator().manual_seed(0)
        )
        errors: dict[str, list[torch.Tensor]] = {"own": [], "other": []}
        for hidden in masks:
            with torch.inference_mode():
                prediction = torch.cat([network.reconstruct(one[None], hidden) for one in images])
            chosen = hidden[..., None] & inside
            errors["own"].append((prediction - target)[chosen].square())
            errors["other"].append((prediction.roll(1, 0) - target)[chosen].square())
        variance = target[inside].var()
        found[f"{network.mask_ratio:.0%}"] = {
            name: float(torch.cat(values).mean() / variance) for name, values in errors.items()
        }
    return found

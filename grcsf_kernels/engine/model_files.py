# SPDX-License-Identifier: Apache-2.0
"""Model files with all that is needed to run them on volumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.models.files import KINDS, load_model
from grcsf_kernels.models.inputs import DataConfig


@dataclass
class Checkpoint:
    """A model with what is needed to run it.

    Attributes:
        model: in evaluation mode, on the CPU.
        data: the preprocessing that it was trained with.
        crop_size: voxels of its training crops.
        maps: what made the residual maps that it was trained with (:func:`describe_maps`); None
            where that is not known.
    """

    model: nn.Module
    data: DataConfig
    crop_size: tuple[int, int, int]
    maps: dict[str, Any] | None = None


def load_checkpoint(path: Path, kind: str) -> Checkpoint:
    """Read a model file with all that is needed to run it on volumes.

    Args:
        path: the file.
        kind: ``"GRCSF"`` or ``"MaskedAutoencoder"``.

    Raises:
        InputError: as for :func:`load_model`; a file without preprocessing or crop size.
    """
    model = load_model(path, KINDS[kind])
    data, size = model.preprocessing, model.crop_size
    if data is None or size is None or len(size) != 3:
        raise InputError(
            path,
            "has no preprocessing or no crop size of three axes",
            "give them to save_pretrained, or train with grcsf",
        )
    return Checkpoint(model, data, (size[0], size[1], size[2]), model.residual_maps)

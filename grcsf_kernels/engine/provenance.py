# SPDX-License-Identifier: Apache-2.0
"""What made residual maps: written beside cached maps and into the segmentation model's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from grcsf_kernels.engine.config import ResidualsConfig
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.files import write_whole

_FILE = "residuals.json"


def digest(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().cpu().numpy().data)
    return found.hexdigest()[:32]


def describe_maps(autoencoders: Sequence[nn.Module], config: ResidualsConfig) -> dict[str, Any]:
    """Mask ratio and weights of each map's autoencoder, in the order of the maps, and settings."""
    return {
        "autoencoders": [
            {"mask_ratio": model.mask_ratio, "weights": digest(model)} for model in autoencoders
        ],
        "draws": config.draws,
        "masking": config.masking,
        "overlap": config.overlap,
        "seed": config.seed,
    }


def save_maps(folder: Path, description: dict[str, Any]) -> None:
    """Write the description of the maps in a folder, whole."""
    text = json.dumps(description, indent=1)
    write_whole(Path(folder) / _FILE, lambda temporary: temporary.write_text(text))


def read_maps(folder: Path) -> dict[str, Any] | None:
    """The description of the maps in a folder; None where there is none (earlier versions).

    Raises:
        InputError: it is damaged.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(path, "is damaged", "run grcsf residuals again") from error


def compare_maps(
    trained: dict[str, Any] | None, found: dict[str, Any] | None, where: Path
) -> list[str]:
    """What speaks against using maps with a model that was trained with others.

    Args:
        trained: the maps that the model was trained with; None: not known.
        found: the maps that it is to be used with; None: not known.
        where: their folder or their autoencoder, for the messages.

    Returns:
        Remarks: maps of other weights or settings are usable at the price of accuracy.

    Raises:
        InputError: the mask ratios differ, so the maps show something else.
    """
    if trained is None or found is None:
        return []
    ratios, others = (
        [round(one["mask_ratio"], 6) for one in maps["autoencoders"]] for maps in (trained, found)
    )
    if ratios != others:
        raise InputError(
            where,
            f"stands for residual maps of mask ratios {others}, and the model was trained with "
            f"{ratios}",
            "use the autoencoders that its residual maps came from",
        )
    remarks = []
    for ours, theirs in zip(trained["autoencoders"], found["autoencoders"], strict=True):
        if ours["weights"] != theirs["weights"]:
            remarks.append(
                f"{where}: the autoencoder of mask ratio {ours['mask_ratio']:g} has other weights "
                "than the one that the model was trained with"
            )
    for name in ("draws", "masking", "overlap"):
        if trained[name] != found[name]:
            remarks.append(
                f"{where}: residual maps with {name} {found[name]}, and the model was trained with "
                f"{trained[name]}"
            )
    return remarks

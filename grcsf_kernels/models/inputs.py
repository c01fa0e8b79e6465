# SPDX-License-Identifier: Apache-2.0
"""What a model file records of a network's input: preprocessing, and where its maps come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import Ascending, Distinct, NotEmpty, Positive

Window = Annotated[tuple[float, float], Ascending(strict=True)]


@dataclass
class DataConfig:
    """How volumes become tensors. Axes are those of the volume in RAS orientation."""

    spacing: tuple[Positive, Positive, Positive] | None = None
    """mm; null keeps each image's own."""
    intensity: Literal["zscore", "window"] = "zscore"
    """zscore: mean 0 and deviation 1 over voxels that are not 0; window: clip, then to [0, 1]."""
    window: Window = (-200.0, 800.0)
    """Hounsfield units, for intensity: window."""
    channel_windows: tuple[Window, ...] = ()
    """One for each channel, before window."""
    crop_foreground: bool = False
    """Leave out the air around: what is not 0, or above the window's low end, stays."""
    bids_suffixes: Annotated[tuple[str, ...], NotEmpty(), Distinct()] = ("T1w",)
    """Of BIDS images, one for each channel."""


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

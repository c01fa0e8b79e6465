# SPDX-License-Identifier: Apache-2.0
"""One picture of segmented cases: image, residual maps, truth and prediction, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grcsf_kernels.engine.files import write_whole

TRUTH, PREDICTION = "#00c8ff", "#ff7a00"  # told apart with any colour vision, and in print


@dataclass
class FigureCase:
    """One row of the picture. Arrays are [X, Y, Z], in RAS+ order; all of one shape.

    Attributes:
        name: shown at the left, with the numbers in ``scores`` under it.
        image: the image.
        residuals: the residual maps [K, X, Y, Z] in [0, 1].
        truth: the expert's (or the synthetic) lesion, not 0 in lesions.
        prediction: what the network says, not 0 in lesions.
        spacing: voxel size in mm, per axis.
        scores: more lines for the row's label, such as ``"Dice 0.81"``.
    """

    name: str
    image: NDArray[np.floating]
    residuals: NDArray[np.floating]
    truth: NDArray[np.generic]
    prediction: NDArray[np.generic]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scores: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        shape = self.image.shape
        if len(shape) != 3:
            raise ValueError(f"image of {self.name} has shape {shape}, expected three axes")
        if self.residuals.shape[1:] != shape:
            raise ValueError(
                f"residuals of {self.name} have shape {self.residuals.shape}, "
                f"expected [K, *{shape}]"
            )
        for what in ("truth", "prediction"):
            found = getattr(self, what).shape
            if found != shape:
                raise ValueError(f"{what} of {self.name} has shape {found}, expected {shape}")


def largest_slice(mask: NDArray[np.generic]) -> int:
    """Index along the last axis of the slice with the largest area; the middle one if empty."""
    area = (mask != 0).sum(axis=(0, 1))
    return int(area.argmax()) if area.any() else mask.shape[2] // 2


def save_figure(
    path: Path,
    cases: Sequence[FigureCase],
    *,
    title: str,
    residual_titles: Sequence[str] = ("residual map, 50 % hidden", "residual map, 75 % hidden"),
    footnote: str = "",
) -> None:
    """Draw the cases, each on its axial slice of the largest lesion area, into a PNG file.

    The file is there whole or not at all.

    Args:
        path: of the PNG file.
        cases: one row each.
        title: above everything.
        residual_titles: one per residual map.
        footnote: below everything.

    Raises:
        ValueError: no cases, or a case with another number of maps than ``residual_titles``.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    if not cases:
        raise ValueError("save_figure needs at least one case")
    for case in cases:
        if len(case.residuals) != len(residual_titles):
            raise ValueError(
                f"case {case.name} has {len(case.residuals)} residual maps, expected "
                f"{len(residual_titles)}: {', '.join(residual_titles)}"
            )
    headings = ["image", *residual_titles, "truth", "prediction (truth outlined)"]
    columns = len(headings)
    figure = Figure(figsize=(2.9 * columns, 3.35 * len(cases) + 1.1), layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        _draw_row(row, case)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=12)
    figure.suptitle(title, fontsize=15)
    if footnote:
        figure.supxlabel(footnote, fontsize=10)

    with matplotlib.rc_context({"savefig.dpi": 110}):
        write_whole(path, lambda temporary: figure.savefig(temporary, metadata={"Software": None}))


def _draw_row(axes: NDArray[np.object_], case: FigureCase) -> None:
    index = largest_slice(case.truth)
    # The box around the head, the same for every panel: air has nothing to show.
    head = np.argwhere((case.image != case.image.min()).any(axis=2))
    low, high = (head.min(0), head.max(0) + 1) if len(head) else ((0, 0), case.image.shape[:2])
    window = (slice(low[0], high[0]), slice(low[1], high[1]), index)

    def view(volume: NDArray[Any]) -> NDArray[Any]:
        return volume[window].T  # x to the right, y upwards, with origin="lower"

    image = view(case.image)
    bright = np.percentile(image[image > image.min()], 99.5) if np.ptp(image) else 1.0
    # By position along the data axes, so that voxels of 0.8 x 0.8 mm and 1 x 2 mm look right.
    look = {"origin": "lower", "aspect": case.spacing[1] / case.spacing[0]}
    truth, prediction = view(case.truth) != 0, view(case.prediction) != 0

    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("black")
    plain = [axes[0], *axes[-2:]]
    for axis in plain:
        axis.imshow(image, cmap="gray", vmin=image.min(), vmax=bright, **look)
    for axis, residual in zip(axes[1:], case.residuals, strict=False):
        shown = view(residual)
        axis.imshow(shown, cmap="magma", vmin=0, vmax=max(np.percentile(shown, 99.8), 1e-6), **look)
    _overlay(axes[-2], truth, TRUTH, look)
    _overlay(axes[-1], prediction, PREDICTION, look)
    for axis in (*axes[1:-2], axes[-1]):
        if truth.any() and not truth.all():
            axis.contour(truth, levels=[0.5], colors=TRUTH, linewidths=1.2)
    axes[0].set_ylabel("\n".join([case.name, f"slice {index}", *case.scores]), fontsize=11)


def _overlay(axis: object, mask: NDArray[np.bool_], color: str, look: dict[str, object]) -> None:
    from matplotlib.colors import to_rgba

    painted = np.zeros((*mask.shape, 4))
    painted[mask] = to_rgba(color, 0.6)
    axis.imshow(painted, interpolation="nearest", **look)  # type: ignore[attr-defined]

# SPDX-License-Identifier: Apache-2.0
"""TensorBoard logs: numbers, and pictures of validation cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grcsf_kernels.engine.figures import PREDICTION, TRUTH, largest_slice

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Logs:
    """Writes to a folder; does nothing where TensorBoard is not installed.

    Args:
        folder: of the event files; made with the first entry.
        enabled: False on all processes but the first.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self._writer: Any = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(folder)

    def number(self, name: str, value: float, epoch: int) -> None:
        """A point of a curve."""
        if self._writer is not None:
            self._writer.add_scalar(name, value, epoch)
            self._writer.flush()

    def overlay(
        self,
        name: str,
        image: NDArray[np.floating],
        label: NDArray[np.generic],
        prediction: NDArray[np.generic],
        epoch: int,
    ) -> None:
        """A validation case, as :func:`draw_overlay` draws it."""
        if self._writer is not None:
            figure = draw_overlay(name, image, label, prediction)
            self._writer.add_figure(f"validation/{name}", figure, epoch)
            self._writer.flush()


def draw_overlay(
    name: str,
    image: NDArray[np.floating],
    label: NDArray[np.generic],
    prediction: NDArray[np.generic],
) -> Figure:
    """The axial slice with the largest lesion, with contours of the label and of the prediction.

    Args:
        name: of the case.
        image: [X, Y, Z], in RAS+ order.
        label: [X, Y, Z], not 0 in lesions.
        prediction: [X, Y, Z], not 0 in lesions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    index = largest_slice(label)
    axis.imshow(image[..., index].T, cmap="gray", origin="lower")
    for mask, color in ((label, TRUTH), (prediction, PREDICTION)):
        inside = mask[..., index].T != 0
        # A contour of nothing, or of everything, has no line.
        if inside.any() and not inside.all():
            axis.contour(inside, levels=[0.5], colors=color, linewidths=1.2)
    axis.set_axis_off()
    axis.set_title(f"{name}, slice {index}: label blue, prediction orange", fontsize=8)
    return figure

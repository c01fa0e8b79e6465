# SPDX-License-Identifier: Apache-2.0
"""Pictures of segmented cases, and plots of their measures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUTH, PREDICTION = "#00c8ff", "#ff7a00"  # told apart with any color vision, and in print
_SIDES = (
    ("R", 0.02, 0.5, "left", "center"),
    ("L", 0.98, 0.5, "right", "center"),
    ("A", 0.5, 0.98, "center", "top"),
    ("P", 0.5, 0.02, "center", "bottom"),
)
_PANEL = 3.1  # inches that a slice is wide


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
    window = (*_box((case.image != case.image.min()).any(axis=2)), index)

    def view(volume: NDArray[Any]) -> NDArray[Any]:
        return volume[window].T  # x to the right, y upwards, with origin="lower"

    image = view(case.image)
    # By position along the data axes, so that voxels of 0.8 x 0.8 mm and 1 x 2 mm look right.
    look = {"origin": "lower", "aspect": case.spacing[1] / case.spacing[0]}
    truth, prediction = view(case.truth) != 0, view(case.prediction) != 0

    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("black")
    plain = [axes[0], *axes[-2:]]
    for axis in plain:
        axis.imshow(image, **_gray(image), **look)
    for axis, residual in zip(axes[1:], case.residuals, strict=False):
        shown = view(residual)
        axis.imshow(shown, cmap="magma", vmin=0, vmax=max(np.percentile(shown, 99.8), 1e-6), **look)
    _overlay(axes[-2], truth, TRUTH, look)
    _overlay(axes[-1], prediction, PREDICTION, look)
    for axis in (*axes[1:-2], axes[-1]):
        if truth.any() and not truth.all():
            axis.contour(truth, levels=[0.5], colors=TRUTH, linewidths=1.2)
    axes[0].set_ylabel("\n".join([case.name, f"slice {index}", *case.scores]), fontsize=11)


def _box(shown: NDArray[np.bool_], margin: int = 0) -> tuple[slice, slice]:
    """The rows and columns with something in them, and ``margin`` around; all where is nothing."""
    inside = np.argwhere(shown)
    if not len(inside):
        return slice(0, shown.shape[0]), slice(0, shown.shape[1])
    low, high = np.maximum(inside.min(0) - margin, 0), inside.max(0) + 1 + margin
    return slice(low[0], high[0]), slice(low[1], high[1])


def _gray(image: NDArray[Any]) -> dict[str, Any]:
    """Gray values up to the bright end of what is not background."""
    bright = np.percentile(image[image > image.min()], 99.5) if np.ptp(image) else 1.0
    return {"cmap": "gray", "vmin": image.min(), "vmax": bright}


def _overlay(axis: object, mask: NDArray[np.bool_], color: str, look: dict[str, object]) -> None:
    from matplotlib.colors import to_rgba

    painted = np.zeros((*mask.shape, 4))
    painted[mask] = to_rgba(color, 0.6)
    axis.imshow(painted, interpolation="nearest", **look)  # type: ignore[attr-defined]


def telling_slices(
    truth: NDArray[np.bool_], prediction: NDArray[np.bool_]
) -> list[tuple[int, list[str]]]:
    """Slices along the last axis that show a case best, and why.

    Args:
        truth: [X, Y, Z].
        prediction: [X, Y, Z].

    Returns:
        The slice with most voxels that differ, and of those with a lesion the one with the highest
        Dice above 0 (the larger lesion of two equal ones), once where they are the same; the middle
        slice where both masks are empty.
    """
    chosen: dict[int, list[str]] = {}
    errors = (truth ^ prediction).sum(axis=(0, 1))
    if errors.any():
        chosen.setdefault(int(errors.argmax()), []).append("largest error")
    areas = truth.sum(axis=(0, 1))
    if areas.any():
        both = (truth & prediction).sum(axis=(0, 1))
        agreement = 2 * both / np.maximum(areas + prediction.sum(axis=(0, 1)), 1)
        best = max(np.flatnonzero(areas), key=lambda index: (agreement[index], areas[index]))
        if agreement[best]:
            chosen.setdefault(int(best), []).append("best agreement")
    return list(chosen.items()) or [(truth.shape[2] // 2, ["no lesion"])]


def draw_slices(
    image: NDArray[np.floating] | None,
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    affine: NDArray[np.floating],
) -> bytes:
    """Axial slices of a case (:func:`telling_slices`) with both contours, as a PNG.

    Slices are shown as radiologists do, the patient's right on the left, in the proportions of the
    voxels.

    Args:
        image: [X, Y, Z]; None: the masks are painted instead.
        truth: [X, Y, Z].
        prediction: [X, Y, Z].
        affine: [4, 4], of the three arrays.

    Returns:
        The bytes of the file.
    """
    from matplotlib.figure import Figure

    orientation = nib.io_orientation(affine)
    sizes = nib.affines.voxel_sizes(affine)
    across, up, through = (int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3))

    def turn(volume: NDArray[Any]) -> NDArray[Any]:
        return nib.apply_orientation(volume, orientation)  # to RAS+

    truth, prediction = turn(truth), turn(prediction)
    if image is None:
        window = _box(np.any(truth | prediction, axis=2), margin=12)
    else:
        image = turn(image)
        window = _box(np.any(image != image.min(), axis=2))
    shown = telling_slices(truth, prediction)
    sides = zip(window, truth.shape, (across, up), strict=False)
    width, height = (len(range(*part.indices(size))) * sizes[axis] for part, size, axis in sides)
    tall = float(np.clip(_PANEL * height / width, 1.5, 1.6 * _PANEL))
    figure = Figure(figsize=(_PANEL * len(shown), tall + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    look = {"origin": "lower", "aspect": sizes[up] / sizes[across], "interpolation": "nearest"}
    for axis, (index, why) in zip(axes, shown, strict=True):
        place = (*window, index)
        slab = None if image is None else image[place].T
        _draw_slice(axis, slab, truth[place].T, prediction[place].T, look)
        # The number that a viewer of the file shows.
        flipped = orientation[through, 1] < 0
        number = truth.shape[2] - 1 - index if flipped else index
        reasons = " and\n".join(why)
        axis.set_title(f"{reasons}: {'ijk'[through]} = {number}", fontsize=10)
    return _png(figure)


def _draw_slice(
    axis: Any,
    image: NDArray[np.floating] | None,
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    look: dict[str, Any],
) -> None:
    """One slice with both contours and the letters of its sides; arrays are [rows, columns]."""
    from matplotlib.patheffects import withStroke

    axis.set_facecolor("black")
    if image is None:
        axis.imshow(truth * 0.35 + prediction * 0.25, cmap="gray", vmin=0, vmax=1, **look)
    else:
        axis.imshow(image, **_gray(image), **look)
    for mask, color, thick in ((truth, TRUTH, 2.0), (prediction, PREDICTION, 1.2)):
        if mask.any():
            # Contours close at the edge of the picture, too.
            grid = (np.arange(-1, size + 1) for size in mask.T.shape)
            axis.contour(*grid, np.pad(mask, 1), levels=[0.5], colors=color, linewidths=thick)
    axis.set_xlim(truth.shape[1] - 0.5, -0.5)  # the patient's right is at the left
    axis.set_ylim(-0.5, truth.shape[0] - 0.5)
    axis.set_xticks([])
    axis.set_yticks([])
    for letter, x, y, ha, va in _SIDES:
        text = axis.text(x, y, letter, ha=ha, va=va, transform=axis.transAxes)
        text.set(color="white", fontsize=10, weight="bold")
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def box_plots(measures: Mapping[str, Sequence[float]]) -> bytes:
    """A box plot for each measure, every case a point, as a PNG.

    Args:
        measures: values by the measure's title; a measure may have none.

    Returns:
        The bytes of the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(measures), 3.4), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    aside = np.random.default_rng(0)  # points beside each other, the same on every call
    for axis, (title, values) in zip(axes, measures.items(), strict=True):
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        if not len(values):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.text(0.5, 0.5, "undefined in\nevery case", ha="center", transform=axis.transAxes)
            continue
        line = {"color": "#222222", "linewidth": 1.4}
        axis.boxplot(values, widths=0.5, showfliers=False, medianprops=line)
        places = 1 + aside.uniform(-0.18, 0.18, len(values))
        dots: dict[str, Any] = {"markersize": 3.5, "alpha": 0.5, "markeredgewidth": 0}
        axis.plot(places, values, "o", color="#1f6feb", **dots)
        axis.set_xticks([])
        axis.set_xlim(0.5, 1.5)
        axis.set_xlabel(f"{len(values)} cases" if len(values) != 1 else "1 case", fontsize=10)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


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
    title = f"{printable(name)}, slice {index}: label blue, prediction orange"
    axis.set_title(title, fontsize=8, parse_math=False)
    return figure

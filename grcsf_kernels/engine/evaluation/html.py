# SPDX-License-Identifier: Apache-2.0
"""``evaluation.html``: measures, plots and slices in one file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from grcsf_kernels._version import __version__
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import InputError, printable
from grcsf_kernels.engine.config import EvaluateConfig
from grcsf_kernels.engine.evaluation.figures import PREDICTION, TRUTH, box_plots, draw_slices
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.nifti import read_label, read_volume
from grcsf_kernels.engine.report import Report

# Title, digits behind the point, and whether a plot shows it.
MEASURES = {
    "dice": ("Dice", 3, True),
    "lesion_f1": ("lesion F1", 3, True),
    "sensitivity": ("sensitivity", 3, False),
    "precision": ("precision", 3, False),
    "hd95": ("HD95, mm", 1, True),
    "volume_difference": ("volume difference, mm³", 0, True),
}
COUNTS = {
    "lesions_found": "lesions found",
    "lesions_missed": "lesions missed",
    "lesions_false": "false lesions",
}


def write_html(
    path: Path,
    result: dict[str, Any],
    cases: Sequence[Case],
    predictions: Path,
    masks: Mapping[str, Path],
    config: EvaluateConfig,
    report: Report,
) -> Path:
    """Write the result of :func:`grcsf_kernels.engine.evaluation.evaluate` as a page, whole.

    Volumes are read again, one case at a time, for the slices only.

    Args:
        path: the HTML file.
        result: what ``evaluation.json`` holds.
        cases: those that were measured.
        predictions: the folder with the masks.
        masks: their files by case.
        config: how many cases have their slices shown, the lowest Dice first; what is a lesion.
        report: its failures are listed.

    Returns:
        ``path``.
    """
    measures = result["cases"]
    worst = sorted(cases, key=lambda case: (measures[case.name]["dice"], case.name))[: config.cases]
    plots = {
        title: [row[name] for row in measures.values() if row[name] is not None]
        for name, (title, _, plotted) in MEASURES.items()
        if plotted
    }
    stream = _template().generate(
        result=result,
        measures=MEASURES,
        counts=COUNTS,
        plots=_embed(box_plots(plots)),
        slices=_slices(worst, masks, config.lesion_labels),
        shown=len(worst),
        alone=any(case.image == case.label for case in worst),
        predictions=predictions,
        failed=[reason for _, reason in report.failed],
        remarks=result["remarks"],
        colors={"label": TRUTH, "prediction": PREDICTION},
        version=__version__,
    )

    def write(temporary: Path) -> None:
        # Piece by piece: the pictures of many cases are never in memory together.
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(stream)

    return write_whole(path, write)


def _template() -> Any:
    """The page; every name in it is escaped."""
    from jinja2 import Environment, StrictUndefined  # torch needs it as well

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["number"] = _number
    source = resources.files("grcsf_kernels.engine.evaluation").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _slices(
    cases: Sequence[Case], masks: Mapping[str, Path], lesion_labels: Sequence[int] | None
) -> Iterator[tuple[str, str, str]]:
    """Name, picture and, where there is none, the reason, of each case."""
    for case in cases:
        assert case.label is not None
        try:
            reference = read_volume(case.image)
            truth = read_label(case.label, reference, lesion_labels).array > 0
            mask = read_label(masks[case.name], reference).array > 0
        except InputError as error:  # it went away since it was measured
            yield case.name, "", str(error)
            continue
        image = None if case.image == case.label else reference.array
        yield case.name, _embed(draw_slices(image, truth, mask, reference.affine)), ""


def _shown(value: object) -> object:
    """Names and reasons as one line of characters that can be encoded; escaped after this."""
    plain = isinstance(value, str | Path) and not hasattr(value, "__html__")
    return printable(value) if plain else value


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _number(value: float | None, digits: int = 3) -> str:
    """With a real minus sign; what is None is undefined."""
    if value is None:
        return "undefined"
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")  # -0.000
    return text.replace("-", "−")  # noqa: RUF001

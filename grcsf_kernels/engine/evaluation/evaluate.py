# SPDX-License-Identifier: Apache-2.0
"""Evaluation of predicted masks against labels."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import InputError, printable
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine.config import EvaluateConfig
from grcsf_kernels.engine.evaluation.bootstrap import sensitivity_by_size, summarize
from grcsf_kernels.engine.evaluation.html import write_html
from grcsf_kernels.engine.evaluation.metrics import find_lesions, measure
from grcsf_kernels.engine.io.datasets import MADE_BY_US, Case, find_labels, find_masks
from grcsf_kernels.engine.io.fingerprint import Origin, image_digest, read_origin
from grcsf_kernels.engine.io.nifti import Volume, read_label, read_volume, stem
from grcsf_kernels.engine.io.search import volumes_in
from grcsf_kernels.engine.report import Report, for_each, warn

# Heading and digits behind the point.
_COLUMNS = {
    "dice": ("Dice", 3),
    "lesion_f1": ("lesion\nF1", 3),
    "sensitivity": ("sensitivity", 3),
    "precision": ("precision", 3),
    "hd95": ("HD95,\nmm", 1),
    "volume_difference": ("volume\ndiff.,\nmm³", 0),
}
# Characters of a folded name, of a table at least, and in a file.
_LEAST, _NARROW, _WIDE = 12, 76, 1000


def evaluate(
    predictions: Path,
    labels: Path,
    output: Path | None = None,
    report: Report | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Measure every ``<case>_mask.nii.gz`` against the label of the same case.

    Args:
        predictions: the folder of :func:`grcsf_kernels.engine.inference.predict`.
        labels: the folder with the labels, with or without their images; see
            :func:`grcsf_kernels.engine.io.datasets.find_labels`.
        output: gets ``evaluation.json`` and ``evaluation.html``, which shows the same with
            pictures; None: the folder of the predictions.
        report: takes the cases that can't be measured; None: only printed.
        config: settings; None: the defaults.

    Returns:
        What ``evaluation.json`` holds. ``cases``: the measures by case
        (:func:`.metrics.measure`); ``mean``: their means over the cases where they are defined;
        ``summary``: means and medians with intervals (:func:`.bootstrap.summarize`);
        ``lesions``: volume in mm^3 and whether it was found, of each lesion by case;
        ``lesions_by_size``: the share of them that was found; ``remarks``: masks whose header says
        that they were made from another image than the label's, or with other settings or models
        than most. What is not defined (the distance to an empty mask) is None.

    Raises:
        InputError: nothing can be measured, or a setting is out of its range.
    """
    config = EvaluateConfig() if config is None else config
    check(config)
    report = Report() if report is None else report
    known = find_labels(labels, report, config.lesion_labels)
    names = {case.name for case in known}
    names |= {stem(path).rsplit("_", 1)[0] for path, _ in report.failed}  # reported already
    masks, double = find_masks(predictions, report)
    known = [case for case in known if case.name not in double]
    for name in sorted(masks.keys() - names):
        report.skip(masks[name], f"{masks[name]}: has no label; add it or remove the mask")
    measured = _Measurement(Path(predictions), masks, config)
    for_each(known, measured, report, "measuring")
    if not measured.cases:
        raise InputError(predictions, "no case can be measured", "see the reasons above")
    result = measured.result()
    folder = Path(output or predictions)
    text = json.dumps(result, indent=1)
    write_whole(folder / "evaluation.json", lambda temporary: temporary.write_text(text))
    shown = [case for case in known if case.name in measured.cases]
    page = folder / "evaluation.html"
    write_html(page, result, shown, predictions, masks, config, report)
    return result


@dataclass
class _Measurement:
    """Measures of cases, as they are read."""

    predictions: Path
    masks: Mapping[str, Path]
    config: EvaluateConfig
    cases: dict[str, dict[str, float | None]] = field(default_factory=dict)
    lesions: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __call__(self, case: Case) -> Path:
        """Measure a case; returns its mask."""
        assert case.label is not None
        if case.name not in self.masks:
            path = self.predictions / f"{case.name}_mask.nii.gz"
            raise InputError(path, "does not exist", "run grcsf predict on all images")
        path = self.masks[case.name]
        reference = read_volume(case.image)
        label = read_label(case.label, reference, self.config.lesion_labels)
        mask = _read_mask(path, case, reference, self.origins, self.remarks)
        spacing = nib.affines.voxel_sizes(reference.affine)
        both = mask.array > 0, label.array > 0
        measures = measure(*both, spacing)
        self.lesions[case.name] = find_lesions(*both, spacing)
        self.cases[case.name] = {
            name: None if math.isnan(value) else value for name, value in measures.items()
        }
        return path

    def result(self) -> dict[str, Any]:
        """What ``evaluation.json`` holds; remarks are printed, too."""
        runs = Counter(origin.run for origin in self.origins.values())
        remarks = [
            *self.remarks,
            *(
                f"{path}: was made with other settings or models than most masks"
                for path, origin in self.origins.items()
                if origin.run != runs.most_common(1)[0][0]
            ),
        ]
        remarks = [printable(remark) for remark in remarks]
        for remark in remarks:
            warn(remark)
        summary = summarize(list(self.cases.values()))
        lesions = self.lesions
        return {
            "cases": self.cases,
            "mean": {name: row["mean"] for name, row in summary.items()},
            "summary": summary,
            "lesions": {name: [list(one) for one in found] for name, found in lesions.items()},
            "lesions_by_size": sensitivity_by_size(lesions.values()),
            "remarks": remarks,
        }


def _read_mask(
    path: Path, case: Case, reference: Volume, origins: dict[Path, Origin], remarks: list[str]
) -> Volume:
    """The mask of a case, with a remark where its header says that it is of another image.

    Raises:
        InputError: it can't be used, or has another shape or affine than the label's image.
    """
    origin = read_origin(path)
    own = True
    if origin is not None:
        origins[path] = origin
        own = case.image == case.label or _is_of(origin, case)
    where = f"was made from another image than {case.image}"
    try:
        mask = read_label(path, reference)
    except InputError as error:
        if own:
            raise
        remedy = "measure masks against the labels of the images that they were made from"
        raise InputError(error.where, f"{where}, and {error.problem}", remedy) from error
    if not own:
        remarks.append(f"{path}: {where}: its numbers may be those of another patient")
    return mask


def _is_of(origin: Origin, case: Case) -> bool:
    """Whether a mask may be of the image of a labeled case."""
    if origin.image == image_digest(case.images):
        return True
    # A labeled case of BIDS has more images than those that it is found by.
    known = (*case.images, case.label)
    others = [
        other
        for other in volumes_in(case.image.parent)
        if stem(other).startswith(f"{case.name}_")
        and other not in known
        and not stem(other).endswith(MADE_BY_US)
    ]
    return bool(others)


def table(result: dict[str, Any]) -> Table:
    """The result of :func:`evaluate` as a table; names are whole at any width, folded if needed."""
    # Without lines between the columns there is room for names in 80 characters.
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    shown.add_column("case", overflow="fold", min_width=_LEAST)
    headings = [heading for heading, _ in _COLUMNS.values()]
    for heading in (*headings, "lesions\nfound/\nmissed/\nfalse"):
        shown.add_column(heading, justify="right", overflow="fold")
    for name, row in [*result["cases"].items(), ("mean", result["mean"])]:
        counts = (row[f"lesions_{kind}"] for kind in ("found", "missed", "false"))
        values = (
            "-" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, (_, digits) in _COLUMNS.items()
        )
        if name == "mean":
            shown.add_section()
        # No markup: a name may hold brackets.
        shown.add_row(Text(printable(name)), *values, "/".join(f"{n:.4g}" for n in counts))
    return shown


def show(result: dict[str, Any]) -> None:
    """Print :func:`table`, in a log or a pipe as wide as it needs to be."""
    terminal, wide, shown = Console(), Console(width=_WIDE), table(result)
    if terminal.is_terminal:
        wide.width = max(terminal.width, _NARROW)
    wide.print(shown)

# SPDX-License-Identifier: Apache-2.0
"""Evaluation of predicted masks against labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.table import Table

from grcsf_kernels.engine.data import Case, find_labels
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.files import write_whole
from grcsf_kernels.engine.metrics import measure
from grcsf_kernels.engine.report import Report, for_each
from grcsf_kernels.engine.volumes import is_volume, read_label, read_volume, stem

_COLUMNS = {
    "dice": "Dice",
    "lesion_f1": "lesion F1",
    "sensitivity": "sensitivity",
    "precision": "precision",
    "hd95": "HD95, mm",
    "volume_difference": "volume diff., mm³",
}


def evaluate(
    predictions: Path,
    labels: Path,
    output: Path | None = None,
    report: Report | None = None,
    lesion_labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure every ``<case>_mask.nii.gz`` against the label of the same case.

    Args:
        predictions: the folder of :func:`grcsf_kernels.engine.predict`.
        labels: the folder with the labels, with or without their images; see
            :func:`grcsf_kernels.engine.data.find_labels`.
        output: gets ``evaluation.json``; None: the folder of the predictions.
        report: takes the cases that can't be measured; None: only printed.
        lesion_labels: the label values that are lesions; None: 1, and 0 is all else.

    Returns:
        ``cases``: the measures by case (:func:`grcsf_kernels.engine.metrics.measure`), and
        ``mean``: their means over the cases where they are defined. What is not defined (the
        distance to an empty mask) is None.

    Raises:
        InputError: nothing can be measured.
    """
    report = Report() if report is None else report
    cases: dict[str, dict[str, float | None]] = {}

    def work(case: Case) -> Path:
        assert case.label is not None
        path = Path(predictions) / f"{case.name}_mask.nii.gz"
        if not path.is_file():
            raise InputError(path, "does not exist", "run grcsf predict on all images")
        reference = read_volume(case.image)
        label = read_label(case.label, reference, lesion_labels)
        mask = read_label(path, reference)
        spacing = nib.affines.voxel_sizes(reference.affine)
        measures = measure(mask.array > 0, label.array > 0, spacing)
        cases[case.name] = {
            name: None if math.isnan(value) else value for name, value in measures.items()
        }
        return path

    known = find_labels(labels, report, lesion_labels)
    names = {case.name for case in known}
    names |= {stem(path).rsplit("_", 1)[0] for path, _ in report.failed}  # reported already
    for path in sorted(Path(predictions).glob("*_mask.nii*")):
        if is_volume(path) and stem(path).removesuffix("_mask") not in names:
            report.skip(path, f"{path}: has no label; add it or remove the mask")
    for_each(known, work, report, "measuring")
    if not cases:
        raise InputError(predictions, "no case can be measured", "see the reasons above")
    result = {"cases": cases, "mean": _mean(list(cases.values()))}
    target = Path(output or predictions) / "evaluation.json"
    write_whole(target, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    return result


def _mean(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def table(result: dict[str, Any]) -> Table:
    """The result of :func:`evaluate` as a table for the terminal."""
    shown = Table("case", *_COLUMNS.values(), "lesions found / missed / false")
    for name, row in [*result["cases"].items(), ("mean", result["mean"])]:
        counts = (row[f"lesions_{kind}"] for kind in ("found", "missed", "false"))
        values = ("-" if row[key] is None else f"{row[key]:.3f}" for key in _COLUMNS)
        if name == "mean":
            shown.add_section()
        shown.add_row(name, *values, " / ".join(f"{count:g}" for count in counts))
    return shown

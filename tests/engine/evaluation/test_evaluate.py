# SPDX-License-Identifier: Apache-2.0
"""What is measured against what, what is said of it, and how it is shown."""

from __future__ import annotations

import html
import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from engine.conftest import AFFINE, blob, make_model, predict_config, write
from rich.console import Console
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli.commands import app
from grcsf_kernels.engine.evaluation.evaluate import table


@pytest.fixture
def masks(folder, tmp_path, model):
    """Masks of the three cases."""
    engine.predict(folder, model, tmp_path / "masks", predict_config())
    return tmp_path / "masks"


def evaluated(masks, labels, **options):
    report = engine.Report()
    return engine.evaluate(masks, labels, report=report, **options), report


class TestOrigin:
    def test_masks_of_the_labeled_images_are_measured_without_a_word(self, folder, masks, capsys):
        result, report = evaluated(masks, folder)
        assert result["remarks"] == [] and not report.failed
        assert set(result["cases"]) == {"case0", "case1", "case2"}

    def test_a_mask_of_another_image_of_that_name_is_said(self, folder, masks, tmp_path, capsys):
        """As in a folder of new patients that are named like those with labels."""
        write(folder / "case1_image.nii.gz", blob(7)[0])
        capsys.readouterr()
        result, report = evaluated(masks, folder)
        assert not report.failed and len(result["cases"]) == 3
        (remark,) = result["remarks"]
        image = folder / "case1_image.nii.gz"
        said = f"{masks / 'case1_mask.nii.gz'}: was made from another image than {image}"
        assert remark.startswith(said)
        assert said in capsys.readouterr().err
        assert html.escape(said) in (masks / "evaluation.html").read_text()
        assert json.loads((masks / "evaluation.json").read_text())["remarks"] == [remark]

    @pytest.mark.parametrize("change", ["shape", "affine"])
    def test_a_mask_of_another_space_is_not_measured(self, folder, masks, change):
        image, label = blob(1, (21, 18, 12) if change == "shape" else (21, 18, 13))
        affine = AFFINE if change == "shape" else AFFINE + np.eye(4, 4, 3)
        write(folder / "case1_image.nii.gz", image, affine)
        write(folder / "case1_label.nii.gz", label, affine)
        result, report = evaluated(masks, folder)
        assert set(result["cases"]) == {"case0", "case2"}
        ((path, reason),) = report.failed
        assert path == masks / "case1_mask.nii.gz"
        assert "was made from another image than" in reason and change in reason

    def test_labels_alone_and_masks_of_others_say_nothing(self, folder, masks):
        for path in folder.glob("*_image.nii.gz"):
            path.unlink()
        image = nib.load(masks / "case0_mask.nii.gz")
        image.header["descrip"] = "by hand"
        nib.save(image, masks / "case0_mask.nii.gz")
        result, _ = evaluated(masks, folder)
        assert len(result["cases"]) == 3 and not result["remarks"]

    def test_masks_of_two_runs_are_said(self, folder, masks, tmp_path):
        other = make_model(tmp_path / "other.safetensors", 1)
        engine.predict(folder / "case2_image.nii.gz", other, masks, predict_config())
        result, _ = evaluated(masks, folder)
        assert result["remarks"] == [
            f"{masks / 'case2_mask.nii.gz'}: was made with other settings or models than most masks"
        ]

    def test_a_second_channel_of_the_case_is_no_other_image(self, folder, masks):
        """Labels of BIDS are found by one image, and masks may come from several."""
        write(folder / "case1_image.nii.gz", blob(7)[0])
        write(folder / "case1_FLAIR.nii.gz", blob(1)[0])
        assert not evaluated(masks, folder)[0]["remarks"]


class TestFaults:
    @pytest.mark.parametrize("what", ["image", "label", "mask"])
    def test_the_file_at_fault_is_named(self, folder, masks, what):
        path = (masks if what == "mask" else folder) / f"case1_{what}.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
        result, report = evaluated(masks, folder)
        assert set(result["cases"]) == {"case0", "case2"}
        ((named, reason),) = report.failed
        assert named == path and reason.startswith(f"{path}: ")

    def test_missing_and_further_masks_are_said(self, folder, masks):
        (masks / "case1_mask.nii.gz").rename(masks / "case9_mask.nii.gz")
        result, report = evaluated(masks, folder)
        assert set(result["cases"]) == {"case0", "case2"}
        reasons = sorted(reason for _, reason in report.failed)
        assert f"{masks / 'case1_mask.nii.gz'}: does not exist" in reasons[0]
        assert f"{masks / 'case9_mask.nii.gz'}: has no label" in reasons[1]

    def test_two_masks_of_a_case_are_said_and_neither_is_measured(self, folder, masks):
        mask = nib.load(masks / "case1_mask.nii.gz")
        nib.save(mask, masks / "case1_mask.nii")
        result, report = evaluated(masks, folder)
        assert set(result["cases"]) == {"case0", "case2"}
        assert "case1_mask.nii" in report.failed[0][1]

    def test_probabilities_are_not_measured_as_masks(self, folder, masks):
        array = np.full((21, 18, 13), 0.7, np.float32)
        write(masks / "case1_mask.nii.gz", array)
        result, report = evaluated(masks, folder)
        assert "case1" not in result["cases"]
        assert f"{masks / 'case1_mask.nii.gz'}: has labels 0.7" in report.failed[0][1]

    def test_an_empty_label_is_a_healthy_subject(self, folder, masks):
        write(folder / "case1_label.nii.gz", np.zeros((21, 18, 13), np.uint8))
        write(masks / "case1_mask.nii.gz", np.zeros((21, 18, 13), np.uint8))
        result, _ = evaluated(masks, folder)
        assert result["cases"]["case1"]["dice"] == 1 and result["cases"]["case1"]["hd95"] is None


NAMES = ("sub-stroke0123_ses-baseline_acq-mprage", "subject_0001", "[bold]x\x1b[31m\n")
ROW = {
    **{"dice": 0.5, "lesion_f1": 1 / 3, "sensitivity": 1.0, "precision": 0.2, "hd95": None},
    **{"volume_difference": -12345.6, "lesions_found": 12, "lesions_missed": 3},
    "lesions_false": 111.333,
}


@pytest.mark.parametrize("width", [76, 80, 100, 200])
def test_names_and_numbers_are_whole_at_any_width(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table({"cases": dict.fromkeys(NAMES, ROW), "mean": ROW}))
    text = console.export_text()
    assert "…" not in text
    first = "".join(line[: line.find(" ") if " " in line else None] for line in text.splitlines())
    assert NAMES[0] in first and "subject_0001" in first
    assert r"[bold]x\x1b[31m\n" in first
    for number in ("0.500", "0.333", "1.000", "-12346", "12/3/111.3"):
        assert text.count(number) == 4


def test_the_table_of_the_command_is_whole_in_a_log(folder, masks):
    result = CliRunner().invoke(app, ["evaluate", str(masks), str(folder)], env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    assert re.search(r"^case1\s+\d\.\d{3}", result.stdout, re.MULTILINE)
    assert "…" not in result.stdout


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a\nb", "a\x1b[31mb", "a\udce4b", "[bold]", "{{ 7 }}"]
)
def test_names_are_escaped_in_the_page(tmp_path, name):
    """Of cases and folders, whatever bytes they have."""
    folder = tmp_path / name.replace("/", "")
    case = name.replace("/", "")
    image, label = blob(0)
    write(folder / f"{case}_image.nii.gz", image)
    write(folder / f"{case}_label.nii.gz", label)
    write(tmp_path / "masks" / f"{case}_mask.nii.gz", label)
    evaluated(tmp_path / "masks", folder, output=tmp_path / "out")
    page = (tmp_path / "out/evaluation.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "\x1b" not in page
    shown = case.replace("\n", r"\n").replace("\x1b", r"\x1b").replace("\udce4", r"\xe4")
    assert f"<h3>{html.escape(shown)}: Dice 1.000" in page

# SPDX-License-Identifier: Apache-2.0
"""No case vanishes: what is doubled, broken, linked or called otherwise is found or named."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from engine.conftest import (
    blob,
    make_autoencoders,
    predict_config,
    pretrain_config,
    residuals_config,
    train_config,
    write,
)
from engine.damage import content_of

from grcsf_kernels import engine
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.datasets import find_cases, find_labels, find_masks


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(cases):
    return [case.name for case in cases]


# The files of case "a" (image, label) in every layout; "{}" is the case.
LAYOUTS = {
    "pairs": ("{}_image.nii.gz", "{}_label.nii.gz"),
    "folders": ("images/{}.nii.gz", "labels/{}.nii.gz"),
    "nnunet": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
    "bids": ("sub-{0}/anat/sub-{0}_T1w.nii.gz", "sub-{0}/anat/sub-{0}_label-L_mask.nii.gz"),
    "derivatives": (
        "sub-{0}/anat/sub-{0}_T1w.nii.gz",
        "derivatives/lesions/sub-{0}/anat/sub-{0}_desc-lesion_mask.nii.gz",
    ),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """The folder, and the paths of image and label of each of the cases a, b and c."""
    root = tmp_path / "data"
    files = {}
    for case in "abc":
        files[case] = [root / pattern.format(case) for pattern in LAYOUTS[request.param]]
        touch(*files[case])
    if request.param == "nnunet":
        description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}}
        (root / "dataset.json").write_text(json.dumps(description))
    return root, files


def case_of(name):
    return name.removeprefix("sub-")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("ending", [".nii", ".NII.GZ"])
def test_two_files_of_one_case_are_reported_and_neither_is_used(layout, part, ending):
    root, files = layout
    path = files["b"][part]
    double = path.with_name(path.name.replace(".nii.gz", ending))
    double.touch()
    report = engine.Report()
    assert [case_of(n) for n in names(find_cases(root, report, labels=True))] == ["a", "c"]
    (failure,) = report.failed
    assert path.name in failure[1] and double.name in failure[1] and "keep one" in failure[1]
    assert "\n" not in failure[1]
    # Without labels only the images have to be clear.
    report = engine.Report()
    found = find_cases(root, report, labels=False)
    assert len(found) == (2 if part == 0 else 3) and len(report.failed) == (part == 0)


@pytest.mark.parametrize("part", [0, 1])
def test_a_case_whose_content_was_dropped_is_still_a_case(layout, part):
    """The reader says what is broken (see test_headers.py): a case must not vanish before."""
    root, files = layout
    files["b"][part].unlink()
    files["b"][part].symlink_to("../.git/annex/objects/MD5E-s1.nii.gz")
    report = engine.Report()
    assert len(find_cases(root, report, labels=True)) == 3 and not report.failed


def test_upper_case_names_are_volumes(layout):
    root, files = layout
    for path in files["b"]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    report = engine.Report()
    assert [case_of(n) for n in names(find_cases(root, report, labels=True))] == ["a", "b", "c"]
    assert not report.failed


def test_linked_folders_are_gone_through(layout, tmp_path):
    root, files = layout
    for path in {path.parent for path in files["b"]} - {root}:
        if path.is_symlink():
            continue
        elsewhere = tmp_path / "elsewhere" / path.relative_to(root)
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    report = engine.Report()
    assert len(find_cases(root, report, labels=True)) == 3 and not report.failed
    assert len(find_labels(root, report)) == 3


def test_linked_subjects_and_sessions_are_found_and_broken_ones_named(tmp_path):
    root = tmp_path / "data"
    store = tmp_path / "store/ses-1/anat"
    for session in ("sub-01_ses-1", "sub-02_ses-1"):
        touch(store / f"{session}_T1w.nii.gz", store / f"{session}_label-L_mask.nii.gz")
    (root / "sub-01").mkdir(parents=True)
    (root / "sub-01/ses-1").symlink_to(store.parent)
    (root / "sub-02").symlink_to(store.parent.parent)
    (root / "sub-03").symlink_to(tmp_path / "gone")
    (root / "sub-01/ses-2").symlink_to(tmp_path / "gone as well")
    (root / "sub-01/loop").symlink_to(root)
    for path in store.glob("sub-02*"):  # one store for each subject
        path.unlink()
    report = engine.Report()
    assert names(find_cases(root, report, labels=True)) == ["sub-01_ses-1"]
    lines = sorted(line for _, line in report.failed)
    assert len(lines) == 2
    assert "sub-01/ses-2: is a link to" in lines[0] and "sub-03: is a link to" in lines[1]


def test_folders_that_can_not_be_listed_are_named(layout, monkeypatch):
    """As without permission, which root always has."""
    root, files = layout
    folder = files["b"][0].parent
    original = os.listdir

    def listdir(path="."):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "listdir", listdir)
    report = engine.Report()
    try:
        find_cases(root, report, labels=False)
    except InputError as error:
        report.skip(error.where, str(error))
    # A label whose image is in there is reported as well.
    assert f"{folder}: can't be listed (Permission denied); check" in report.failed[0][1]


class TestIsles:
    def test_2022(self, tmp_path):
        for case in ("0001", "0002"):
            name = f"sub-strokecase{case}_ses-0001"
            folder = f"sub-strokecase{case}/ses-0001"
            touch(
                tmp_path / folder / f"dwi/{name}_dwi.nii.gz",
                tmp_path / folder / f"dwi/{name}_adc.nii.gz",
                tmp_path / "derivatives" / folder / f"{name}_msk.nii.gz",
            )
        report = engine.Report()
        cases = find_cases(tmp_path, report, labels=True, suffixes=("dwi", "adc"))
        assert len(cases) == 2 and not report.failed
        assert cases[0].label.name == "sub-strokecase0001_ses-0001_msk.nii.gz"
        assert len(find_labels(tmp_path, engine.Report())) == 2

    def test_2024(self, tmp_path):
        name = "sub-stroke0001_ses-02"
        folder = "sub-stroke0001/ses-02"
        mask = tmp_path / "derivatives" / folder / f"{name}_lesion-msk.nii.gz"
        touch(tmp_path / "raw_data" / folder / f"{name}_dwi.nii.gz", mask)
        touch(tmp_path / "derivatives" / folder / f"{name}_lvo-msk.nii.gz")
        (case,) = find_cases(tmp_path, engine.Report(), labels=True, suffixes=("dwi",))
        assert case.label == mask

    def test_segmentations_of_lesions_and_not_of_tissue(self, tmp_path, capsys):
        touch(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
        touch(tmp_path / "derivatives/prep/sub-01/anat/sub-01_dseg.nii.gz")
        report = engine.Report()
        with pytest.raises(InputError, match="holds no usable case"):
            find_cases(tmp_path, report, labels=True)
        assert "masks called dseg are not taken for lesions" in capsys.readouterr().err
        mask = tmp_path / "derivatives/lesions/sub-01/anat/sub-01_label-lesion_dseg.nii.gz"
        touch(mask)
        (case,) = find_cases(tmp_path, engine.Report(), labels=True)
        assert case.label == mask

    def test_a_label_of_another_name_beside_the_image_is_named(self, tmp_path, capsys):
        touch(tmp_path / "a_image.nii.gz", tmp_path / "a_msk.nii.gz")
        touch(tmp_path / "b_image.nii.gz", tmp_path / "b_label.nii.gz")
        report = engine.Report()
        assert names(find_cases(tmp_path, report, labels=True)) == ["b"]
        (failure,) = report.failed
        assert "has no label; if a_msk.nii.gz is it, call it a_label.nii.gz" in failure[1]
        assert "1 file(s) are left out, such as a_msk.nii.gz" in capsys.readouterr().err


class TestBidsNamesWhatItLeavesOut:
    def test_sessions_without_the_image_that_is_wanted(self, tmp_path, capsys):
        touch(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
        touch(tmp_path / "sub-02/anat/sub-02_FLAIR.nii.gz")
        assert names(find_cases(tmp_path, engine.Report(), labels=False)) == ["sub-01"]
        said = " ".join(capsys.readouterr().err.split())
        assert "1 session(s) have no T1w and are left out, such as sub-02; they have FLAIR" in said

    def test_masks_in_another_space_than_the_others(self, tmp_path, capsys):
        for subject, space in (("01", ""), ("02", "_space-MNI152")):
            anat = tmp_path / f"sub-{subject}/anat"
            touch(anat / f"sub-{subject}{space}_T1w.nii.gz")
            touch(anat / f"sub-{subject}{space}_label-L_mask.nii.gz")
        assert names(find_cases(tmp_path, engine.Report(), labels=True)) == ["sub-01"]
        said = " ".join(capsys.readouterr().err.split())
        assert "1 session(s) have masks in space MNI152 only" in said and "sub-02" in said

    def test_a_mask_whose_run_has_no_image(self, tmp_path):
        anat = tmp_path / "sub-01/anat"
        touch(anat / "sub-01_run-1_T1w.nii.gz", anat / "sub-01_run-1_label-L_mask.nii.gz")
        touch(anat / "sub-01_run-2_label-L_mask.nii.gz")
        report = engine.Report()
        assert names(find_cases(tmp_path, report, labels=True)) == ["sub-01_run-1"]
        (failure,) = report.failed
        assert "sub-01_run-2_label-L_mask.nii.gz: has no image of its run" in failure[1]


def test_a_label_and_a_file_without_ending_are_two_of_one_case(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "a_label.nii.gz", tmp_path / "b.nii.gz")
    report = engine.Report()
    assert names(find_labels(tmp_path, report)) == ["b"]
    assert len(report.failed) == 1


def test_one_file_of_which_a_channel_is_doubled_is_refused(tmp_path):
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"lesion": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "a_0001.nii"):
        touch(tmp_path / "imagesTs" / name)
    with pytest.raises(InputError, match=r"a_0000.nii.gz: has a channel of two files"):
        find_cases(tmp_path / "imagesTs/a_0000.nii.gz", engine.Report(), labels=False)


def test_an_argument_that_is_a_broken_link_is_said(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to("gone.nii.gz")
    (tmp_path / "data").symlink_to("nowhere")
    for name in ("a.nii.gz", "data"):
        with pytest.raises(InputError, match=rf"{name}: is a link to .*, which is not there"):
            find_cases(tmp_path / name, engine.Report(), labels=False)


class TestEveryCommand:
    """One case of three has two images, one a broken link; the third is sound."""

    @pytest.fixture
    def spoiled(self, folder):
        path = folder / "case0_image.nii.gz"
        (folder / "case0_image.nii").write_bytes(content_of(path))
        (folder / "case1_image.nii.gz").unlink()
        (folder / "case1_image.nii.gz").symlink_to("../.git/annex/objects/a")
        return folder

    def check(self, report):
        lines = sorted(line for _, line in report.failed)
        assert len(lines) == 2
        assert "case0_image.nii: gives the same name 'case0' as case0_image.nii.gz" in lines[0]
        assert "case1_image.nii.gz: is a link whose content is not here; fetch it" in lines[1]

    def test_doubles_and_broken_links_are_reported(self, spoiled, tmp_path, model):
        report = engine.Report()
        engine.pretrain(spoiled, tmp_path / "mae", pretrain_config(epochs=1), report)
        self.check(report)
        autoencoders = make_autoencoders(tmp_path)
        report = engine.cache_residuals(spoiled, autoencoders, tmp_path / "r", residuals_config())
        self.check(report)
        report = engine.Report()
        config = train_config(use_rcu=False, epochs=1)
        engine.train(spoiled, tmp_path / "run", config, report=report)
        self.check(report)
        report = engine.predict(spoiled, model, tmp_path / "masks", predict_config())
        self.check(report)
        (mask,) = report.done
        assert mask.name == "case2_mask.nii.gz"
        for case in ("case0", "case1"):
            shutil.copy(mask, tmp_path / f"masks/{case}_mask.nii.gz")
        report = engine.Report()
        assert set(engine.evaluate(tmp_path / "masks", spoiled, report=report)["cases"]) == {
            "case2"
        }
        self.check(report)

    def test_two_masks_of_one_case_are_reported_by_evaluate(self, folder, tmp_path):
        masks = tmp_path / "masks"
        for index in range(3):
            write(masks / f"case{index}_mask.nii.gz", blob(index)[1])
        write(masks / "case1_mask.nii", blob(0)[1])
        (masks / "case2_mask.nii.gz").rename(masks / "case2_mask.NII.GZ")
        report = engine.Report()
        assert set(engine.evaluate(masks, folder, report=report)["cases"]) == {"case0", "case2"}
        (failure,) = report.failed
        assert "case1_mask.nii: gives the same name 'case1' as case1_mask.nii.gz" in failure[1]
        assert find_masks(masks, engine.Report())[1] == {"case1"}

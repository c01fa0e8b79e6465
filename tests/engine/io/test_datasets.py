# SPDX-License-Identifier: Apache-2.0
"""Cases are found in nnU-Net's and BIDS's folders; what is incomplete is reported and skipped."""

from __future__ import annotations

import json

import pytest

from grcsf_kernels import engine
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.datasets import Case, find_cases, find_labels


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def describe(root, **changes):
    values = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(values | changes))


@pytest.fixture
def nnunet(tmp_path):
    root = tmp_path / "Dataset001_Lesion"
    describe(root)
    for name in ("a", "b"):
        touch(root / f"labelsTr/{name}.nii.gz")
        touch(*(root / f"imagesTr/{name}_000{c}.nii.gz" for c in (0, 1)))
    touch(*(root / f"imagesTs/c_000{c}.nii.gz" for c in (0, 1)))
    return root


class TestNnunet:
    def test_training_cases_have_all_channels(self, nnunet):
        report = engine.Report()
        first, second = find_cases(nnunet, report, labels=True)
        assert (first.name, second.name) == ("a", "b") and not report.failed
        assert [path.name for path in first.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
        assert first.label == nnunet / "labelsTr/a.nii.gz"

    def test_test_images_by_their_folder_and_by_their_file(self, nnunet):
        report = engine.Report()
        (case,) = find_cases(nnunet / "imagesTs", report, labels=False)
        assert (case.name, len(case.images)) == ("c", 2)
        assert find_cases(nnunet / "imagesTs/c_0000.nii.gz", report, labels=False) == [case]
        with pytest.raises(InputError, match="is not the first channel"):
            find_cases(nnunet / "imagesTs/c_0001.nii.gz", report, labels=False)

    def test_a_missing_channel_is_reported_once(self, nnunet):
        (nnunet / "imagesTr/a_0001.nii.gz").unlink()
        report = engine.Report()
        (case,) = find_cases(nnunet, report, labels=True)
        assert case.name == "b"
        (failure,) = report.failed
        assert "a_0001.nii.gz: does not exist; expected 2 channel(s)" in failure[1]

    def test_a_channel_too_many_and_a_file_without_number(self, nnunet):
        touch(nnunet / "imagesTr/a_0002.nii.gz", nnunet / "imagesTr/odd.nii.gz")
        report = engine.Report()
        (case,) = find_cases(nnunet, report, labels=True)
        assert case.name == "b" and len(report.failed) == 2

    def test_more_labels_need_a_setting(self, nnunet):
        describe(nnunet, labels={"background": 0, "core": 1, "edema": [1, 2]})
        with pytest.raises(
            InputError, match=r"dataset.json: has the labels .*edema.*lesion_labels"
        ):
            find_cases(nnunet, engine.Report(), labels=True)
        assert len(find_cases(nnunet, engine.Report(), labels=False)) == 2
        assert len(find_cases(nnunet, engine.Report(), labels=True, lesion_labels=(1, 2))) == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "can't be used"),
            ('{"labels": {}}', "can't be used"),
            ('{"channel_names": {"0": "T1"}, "labels": {"l": 1}, "file_ending": ".mha"}', "ending"),
        ],
    )
    def test_a_wrong_description(self, nnunet, text, message):
        (nnunet / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=rf"dataset.json: .*{message}"):
            find_cases(nnunet, engine.Report(), labels=True)

    def test_uncompressed_and_the_first_version(self, tmp_path):
        describe(
            tmp_path,
            channel_names={"0": "CT"},
            labels={"0": "background", "1": "lesion"},
            file_ending=".nii",
        )
        touch(tmp_path / "imagesTr/a_0000.nii", tmp_path / "labelsTr/a.nii")
        (case,) = find_cases(tmp_path, engine.Report(), labels=True)
        assert case.label == tmp_path / "labelsTr/a.nii" and not case.more

    def test_no_description(self, tmp_path):
        touch(tmp_path / "imagesTr/a_0000.nii.gz")
        with pytest.raises(InputError, match=r"has imagesTr and no dataset.json"):
            find_cases(tmp_path, engine.Report(), labels=False)

    def test_labels_are_found_for_evaluation(self, nnunet):
        assert [case.name for case in find_labels(nnunet, engine.Report())] == ["a", "b"]
        labels = find_labels(nnunet / "labelsTr", engine.Report())
        assert labels[0].image == labels[0].label == nnunet / "labelsTr/a.nii.gz"


def test_a_plain_folder_of_numbered_channels(tmp_path):
    touch(*(tmp_path / f"{name}_000{c}.nii.gz" for name in "ab" for c in (0, 1, 2)))
    cases = find_cases(tmp_path, engine.Report(), labels=False)
    assert [(case.name, len(case.images)) for case in cases] == [("a", 3), ("b", 3)]
    touch(tmp_path / "scan_2023.nii.gz")  # then the numbers are names
    assert len(find_cases(tmp_path, engine.Report(), labels=False)) == 7


ATLAS = "space-MNI152NLin2009aSym"


@pytest.fixture
def atlas(tmp_path):
    """ATLAS R2.0: two sessions of one subject, one of another, and one without a lesion mask."""
    for cohort, subject, session in (("R001", 1, 1), ("R001", 1, 2), ("R002", 1, 1)):
        name = f"sub-{cohort.lower()}s{subject:03d}"
        stem = f"Training/{cohort}/{name}/ses-{session}/anat/{name}_ses-{session}_{ATLAS}"
        touch(tmp_path / f"{stem}_T1w.nii.gz")
        touch(tmp_path / f"{stem}_label-L_desc-T1lesion_mask.nii.gz")
    stem = f"Training/R003/sub-r003s001/ses-1/anat/sub-r003s001_ses-1_{ATLAS}"
    touch(tmp_path / f"{stem}_T1w.nii.gz", tmp_path / f"{stem}_desc-brain_mask.nii.gz")
    return tmp_path


class TestBids:
    def test_atlas(self, atlas):
        report = engine.Report()
        cases = find_cases(atlas, report, labels=True)
        assert [case.name for case in cases] == [
            "sub-r001s001_ses-1",
            "sub-r001s001_ses-2",
            "sub-r002s001_ses-1",
        ]
        assert [case.subject for case in cases][:2] == ["sub-r001s001"] * 2
        assert all(case.label.name.endswith("_label-L_desc-T1lesion_mask.nii.gz") for case in cases)
        assert all(case.label.parent == case.image.parent for case in cases)
        (failure,) = report.failed
        assert "sub-r003s001" in failure[1] and "has no label" in failure[1]
        assert len(find_cases(atlas, engine.Report(), labels=False)) == 4

    def test_one_subject_and_labels_for_evaluation(self, atlas):
        folder = atlas / "Training/R001/sub-r001s001"
        assert len(find_cases(folder, engine.Report(), labels=True)) == 2
        assert len(find_labels(atlas, engine.Report())) == 3

    def test_derivatives_beside_raw(self, tmp_path):
        """The mask is in the raw image's space, so the registered derivative is not taken."""
        raw = tmp_path / "sub-01/anat/sub-01_T1w.nii.gz"
        derived = tmp_path / "derivatives/lesions/sub-01/anat"
        mask = derived / "sub-01_space-orig_label-lesion_mask.nii.gz"
        touch(raw, mask, derived / "sub-01_space-MNI152_T1w.nii.gz")
        touch(tmp_path / "sub-02/anat/sub-02_T1w.nii.gz")
        report = engine.Report()
        assert find_cases(tmp_path, report, labels=True) == [Case("sub-01", raw, mask)]
        both = find_cases(tmp_path, engine.Report(), labels=False)
        assert [case.name for case in both] == ["sub-01", "sub-02"]

    def test_without_masks_the_raw_images(self, tmp_path):
        raw = tmp_path / "sub-01/anat/sub-01_T1w.nii.gz"
        touch(raw, tmp_path / "derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
        (case,) = find_cases(tmp_path, engine.Report(), labels=False)
        assert case.image == raw

    def test_several_channels_and_one_that_is_missing(self, tmp_path):
        for subject in ("01", "02"):
            anat = tmp_path / f"sub-{subject}/anat"
            touch(anat / f"sub-{subject}_acq-mprage_T1w.nii.gz")
            touch(anat / f"sub-{subject}_label-lesion_mask.nii.gz")
        touch(tmp_path / "sub-01/anat/sub-01_FLAIR.nii.gz")
        report = engine.Report()
        (case,) = find_cases(tmp_path, report, labels=True, suffixes=("FLAIR", "T1w"))
        assert [path.name[-14:] for path in case.images] == ["1_FLAIR.nii.gz", "age_T1w.nii.gz"]
        (failure,) = report.failed
        assert "sub-02 has no FLAIR" in failure[1]

    def test_runs_are_cases_and_doubles_are_reported(self, tmp_path):
        anat = tmp_path / "sub-01/anat"
        for run in (1, 2):
            touch(anat / f"sub-01_run-{run}_T1w.nii.gz")
            touch(anat / f"sub-01_run-{run}_desc-lesion_mask.nii.gz")
        touch(*(tmp_path / f"sub-02/anat/sub-02_acq-{a}_T1w.nii.gz" for a in "xy"))
        touch(tmp_path / "sub-02/anat/sub-02_label-L_mask.nii.gz")
        report = engine.Report()
        cases = find_cases(tmp_path, report, labels=True)
        assert [case.name for case in cases] == ["sub-01_run-1", "sub-01_run-2"]
        assert [case.label.name[7:12] for case in cases] == ["run-1", "run-2"]
        names = [case.name for case in find_labels(tmp_path, engine.Report())]
        assert names == ["sub-01_run-1", "sub-01_run-2", "sub-02"]
        (failure,) = report.failed
        assert "sub-02 has several T1w" in failure[1]

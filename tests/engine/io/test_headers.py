# SPDX-License-Identifier: Apache-2.0
"""Headers are believed when the file agrees; units, quaternions and labels mean what they say."""

from __future__ import annotations

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
from engine.conftest import (
    AFFINE,
    blob,
    load,
    make_autoencoders,
    make_model,
    predict_config,
    pretrain_config,
    residuals_config,
    train_config,
    write,
)
from engine.damage import BIG, HEADERS, change, content_of, shorten, write_content

from grcsf_kernels import engine
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.buffers import NoRoomError, Scratch
from grcsf_kernels.engine.io.nifti import (
    read_description,
    read_geometry,
    read_label,
    read_volume,
    write_volume,
)


def check_refusal(path, problem, read=read_volume):
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and problem in line and "\n" not in line, line


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_damaged_header_is_one_line(tmp_path, name, suffix):
    fields, problem = HEADERS[name]
    path = change(write(tmp_path / f"a{suffix}", blob(0)[0]), **fields)
    check_refusal(path, problem)
    check_refusal(path, problem, read_geometry)
    assert read_description(path) is None


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_truncated_file_and_one_that_is_too_long_are_refused(tmp_path, suffix):
    image = blob(0)[0]
    path = write(tmp_path / f"a{suffix}", image)
    for count in (1, 100, path.stat().st_size - 200, path.stat().st_size - 1):
        check_refusal(shorten(write(path, image), count), "truncated")
    whole = content_of(write(path, image))
    check_refusal(write_content(path, whole[:-1]), "is truncated or its header is damaged")
    check_refusal(write_content(path, whole + b"x" * 5000), "is longer than its header says")
    # What programs leave behind the voxels does no harm.
    assert np.array_equal(read_volume(write_content(path, whole + bytes(100))).array, image)
    path.write_bytes(b"")
    check_refusal(path, "is empty")


@pytest.mark.parametrize("length", [-9, -8, 0, 1, 7, 2_000_000_000])
def test_an_extension_that_does_not_fit_is_refused(tmp_path, length):
    path = write(tmp_path / "a.nii.gz", blob(0)[0])
    content = content_of(path)
    extension = struct.pack("<ii", length, 6) + b"x" * 24
    longer = content[:348] + b"\1\0\0\0" + extension + content[352:]
    write_content(path, longer)
    change(path, vox_offset=352.0 + len(extension))
    check_refusal(path, f"a header extension of {length} bytes")


def test_extensions_are_kept_in_what_is_written(tmp_path):
    image = nib.Nifti1Image(blob(0)[0], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the scanner"))
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "b.nii.gz", (volume.array > 0).astype(np.uint8), volume)
    (found,) = nib.load(tmp_path / "b.nii.gz").header.extensions
    assert found.get_content().rstrip(b"\0") == b"of the scanner"


def test_a_name_that_says_another_compression_is_said(tmp_path):
    path = write(tmp_path / "a.nii.gz", blob(0)[0])
    packed, plain = path.read_bytes(), content_of(path)
    (tmp_path / "b.nii").write_bytes(packed)
    check_refusal(tmp_path / "b.nii", "is compressed by gzip; call it b.nii.gz")
    path.write_bytes(plain)
    check_refusal(path, "is not compressed; call it a.nii")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "device.nii.gz").symlink_to("/dev/zero")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "gone.nii.gz").symlink_to("/nowhere/a.nii.gz")
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/Xk/0f/MD5E-s1")
    (tmp_path / "round.nii.gz").symlink_to("round.nii.gz")
    (tmp_path / "lfs.nii").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, problem in {
        "pipe": "is a pipe or a device",
        "device": "is a pipe or a device",
        "folder": "is a folder",
        "gone": "is a link to /nowhere/a.nii.gz, which is not there",
        "annex": "is a link whose content is not here; fetch it (datalad get,",
        "round": "is a link to round.nii.gz",
        "none": "does not exist",
    }.items():
        path = tmp_path / f"{name}.nii.gz"
        for read in (read_volume, read_geometry):
            check_refusal(path, problem, read)
        assert read_description(path) is None
    check_refusal(tmp_path / "lfs.nii", "stands for a file that is not here; fetch it: git lfs")


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A few kilobytes that unpack to gigabytes are given up as soon as they say too much."""
    path = write(tmp_path / "a.nii.gz", blob(0)[0])
    whole = content_of(path)
    member = gzip.compress(bytes(1 << 24), 9)
    path.write_bytes(gzip.compress(whole) + member * 256)  # 4 GB
    unpacked, original = [], gzip.GzipFile.read

    def count(self, size=-1):
        block = original(self, size)
        unpacked.append(len(block))
        return block

    monkeypatch.setattr(gzip.GzipFile, "read", count)
    check_refusal(path, "is longer than its header says")
    assert sum(unpacked) < 1 << 24


def test_a_volume_that_no_memory_can_hold_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz", blob(0)[0])
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    check_refusal(path, "and this machine has 0 GB; crop or resample it")


def test_geometry_is_read_without_unpacking_the_voxels(tmp_path, monkeypatch):
    """Cached cases ask for it whenever a crop is made."""
    path = write(tmp_path / "a.nii.gz", np.zeros((128, 128, 64), np.float32))
    unpacked, original = [], gzip.GzipFile.read

    def count(self, size=-1):
        block = original(self, size)
        unpacked.append(len(block))
        return block

    monkeypatch.setattr(gzip.GzipFile, "read", count)
    assert np.allclose(read_geometry(path).affine, AFFINE, rtol=1e-6)
    assert 0 < sum(unpacked) < 1000


def test_a_rounding_error_in_a_quaternion_is_read(tmp_path):
    """Half turns are stored as a quaternion of length 1, which rounding makes longer."""
    path = tmp_path / "a.nii.gz"
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    image = nib.Nifti1Image(blob(0)[0], affine)
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    nib.save(image, path)
    change(path, quatern_d=1 + 2e-6)
    volume = read_volume(path)
    assert np.allclose(volume.affine, affine, atol=1e-5)
    mask = write_volume(tmp_path / "b.nii.gz", blob(0)[1], volume)
    assert np.allclose(nib.load(mask).affine, affine, atol=1e-5)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3), ("unknown", 1.0)])
def test_units_of_the_file_become_millimeters_and_are_kept(tmp_path, unit, scale):
    affine = AFFINE.copy()
    affine[:3] *= scale
    for version, kind in enumerate((nib.Nifti1Image, nib.Nifti2Image)):
        image = kind(blob(0)[0], affine)
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / f"{version}_image.nii.gz")
        volume = read_volume(tmp_path / f"{version}_image.nii.gz")
        assert np.allclose(volume.affine, AFFINE, rtol=1e-5)
        assert np.allclose(read_geometry(volume.path).affine, AFFINE, rtol=1e-5)
        label = write(tmp_path / "label.nii.gz", blob(0)[1])  # in millimeters
        assert read_label(label, volume).array.any()
        mask = nib.load(write_volume(tmp_path / "mask.nii.gz", blob(0)[1], volume))
        assert mask.header.get_xyzt_units()[0] == unit
        assert np.array_equal(mask.affine, nib.load(volume.path).affine)
        assert mask.header["sform_code"] == nib.load(volume.path).header["sform_code"]


def test_measures_of_images_in_meters_and_microns_are_those_in_millimeters(folder, tmp_path):
    masks = tmp_path / "masks"
    for index in range(3):
        write(masks / f"case{index}_mask.nii.gz", np.roll(blob(index)[1], 2, axis=0))
    expected = engine.evaluate(masks, folder)["cases"]
    for where, unit, scale in ((folder, "meter", 1e-3), (masks, "micron", 1e3)):
        for path in where.glob("*.nii.gz"):
            affine = AFFINE.copy()
            affine[:3] *= scale
            changed = nib.Nifti1Image(load(path), affine)
            changed.header.set_xyzt_units(unit)
            nib.save(changed, path)
    found = engine.evaluate(masks, folder)["cases"]
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-4)


@pytest.mark.parametrize("lesion_labels", [None, (1,)])
def test_labels_beside_a_whole_number_by_rounding_are_that_number(tmp_path, lesion_labels):
    volume = read_volume(write(tmp_path / "image.nii.gz", blob(0)[0]))
    label = blob(0)[1]
    near = write(tmp_path / "near.nii.gz", label * np.float32(0.99999994))
    scaled = write(tmp_path / "scaled.nii.gz", label * np.uint8(255))
    change(scaled, scl_slope=1 / 255, scl_inter=0.0)
    assert set(np.unique(load(near))) != {0, 1}
    for path in (near, scaled):
        assert np.array_equal(read_label(path, volume, lesion_labels).array, label)
    far = write(tmp_path / "far.nii.gz", label * np.float32(0.9999))
    with pytest.raises(InputError, match=r"far.nii.gz: has labels 0, 0.9999; expected"):
        read_label(far, volume, lesion_labels)


class TestCommands:
    """A folder with three good cases and one of each damage."""

    @pytest.fixture
    def damaged(self, folder):
        for index, (fields, _) in enumerate(HEADERS.values()):
            bad = write(folder / f"bad{index:02d}_image.nii.gz", blob(0)[0])
            write(folder / f"bad{index:02d}_label.nii.gz", blob(0)[1])
            change(bad, **fields)
        return folder

    def check(self, report, capfd):
        lines = [reason for _, reason in report.failed]
        assert len(lines) == len(HEADERS)
        for index, (_, problem) in enumerate(HEADERS.values()):
            (line,) = (line for line in lines if f"bad{index:02d}_image.nii.gz: " in line)
            assert problem in line and "\n" not in line and ";" in line
        assert "Traceback" not in capfd.readouterr().err

    def test_training_goes_on_without_damaged_files(self, damaged, tmp_path, capfd):
        report = engine.Report()
        engine.pretrain(damaged, tmp_path / "mae", pretrain_config(epochs=1), report)
        self.check(report, capfd)
        report = engine.Report()
        config = train_config(use_rcu=False, epochs=1)
        engine.train(damaged, tmp_path / "run", config, report=report)
        self.check(report, capfd)

    def test_prediction_and_maps_go_on_without_damaged_files(self, damaged, tmp_path, capfd):
        autoencoders = make_autoencoders(tmp_path)
        report = engine.cache_residuals(
            damaged, autoencoders, tmp_path / "maps", residuals_config()
        )
        assert len(report.done) == 3
        self.check(report, capfd)
        model = make_model(tmp_path / "model.safetensors")
        report = engine.predict(damaged, model, tmp_path / "masks", predict_config())
        assert len(report.done) == 3
        self.check(report, capfd)

    def test_evaluation_names_the_label_that_is_damaged(self, folder, tmp_path, capfd):
        for index in range(3):
            write(tmp_path / f"masks/case{index}_mask.nii.gz", blob(index)[1])
        label = change(folder / "case1_label.nii.gz", datatype=9999)
        report = engine.Report()
        result = engine.evaluate(tmp_path / "masks", folder, report=report)
        assert set(result["cases"]) == {"case0", "case2"}
        (failure,) = report.failed
        assert failure[0] == label and failure[1].startswith(f"{label}: ")
        assert "Traceback" not in capfd.readouterr().err

    def test_a_claim_beyond_the_file_takes_no_disk(self, folder, tmp_path, model, monkeypatch):
        for name in ("a.nii.gz", "a.nii"):
            write(folder / name.replace("a", "aaa_image"), blob(0)[0])
        (folder / "aaa_image.nii").rename(folder / "bbb_image.nii")
        for name in ("aaa_image.nii.gz", "bbb_image.nii"):
            change(folder / name, **{axis: 2000 for axis in BIG})
        claimed = []
        original = Scratch.volume

        def volume(self, channels, space, dtype):
            claimed.append(space)
            return original(self, channels, space, dtype)

        monkeypatch.setattr(Scratch, "volume", volume)
        config = predict_config(accumulate="disk")
        report = engine.predict(folder, model, tmp_path / "masks", config)
        assert len(report.done) == 3 and len(report.failed) == 2
        assert claimed and max(np.prod(space) for space in claimed) < 1e5

    def test_scratch_that_the_disk_has_no_room_for_is_a_matter_of_the_case(
        self, folder, tmp_path, model, monkeypatch, capfd
    ):
        original = Scratch.volume

        def volume(self, channels, space, dtype):
            if space[0] == 40:
                raise NoRoomError(28, "No space left on device for 99.0 GB", str(tmp_path))
            return original(self, channels, space, dtype)

        write(folder / "aaa_image.nii.gz", blob(0, (40, 18, 13))[0])
        monkeypatch.setattr(Scratch, "volume", volume)
        report = engine.predict(folder, model, tmp_path / "masks", predict_config())
        assert len(report.done) == 3
        (failure,) = report.failed
        assert "aaa_image.nii.gz: " in failure[1] and "99.0 GB" in failure[1]
        assert "Traceback" not in capfd.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Prediction: what goes in, ensembles, mirroring, clean-up and geometry."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from engine.conftest import (
    blob,
    load,
    make_autoencoders,
    make_model,
    train_config,
    write,
)
from engine.conftest import predict_config as config
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.engine.buffers import Scratch
from grcsf_kernels.engine.data.samples import Preprocessing
from grcsf_kernels.engine.inference.postprocessing import remove_small
from grcsf_kernels.engine.inference.sliding_window import predict_logits
from grcsf_kernels.engine.io.nifti import read_volume
from grcsf_kernels.engine.training.train import build


def probability(folder, case="case0"):
    return load(folder / f"{case}_probability.nii.gz")


def names(report):
    return [path.name for path in report.done]


class TestInputs:
    def test_files_folders_and_lists(self, folder, tmp_path, model):
        (folder / "list.txt").write_text(f"case2_image.nii.gz\n\n{folder / 'case0_image.nii.gz'}\n")
        out = tmp_path / "m"
        report = engine.predict(folder / "list.txt", model, out, config())
        assert names(report) == ["case0_mask.nii.gz", "case2_mask.nii.gz"]
        report = engine.predict(
            [folder / "case1_image.nii.gz", folder / "list.txt"], model, out, config()
        )
        assert names(report) == [f"case{n}_mask.nii.gz" for n in range(3)]
        assert names(engine.predict([folder, folder], model, out, config())) == names(report)

    def test_a_missing_file_of_several_is_reported(self, folder, tmp_path, model):
        paths = [folder / "case0_image.nii.gz", folder / "gone.nii.gz"]
        report = engine.predict(paths, model, tmp_path / "m", config())
        assert len(report.done) == 1
        assert "gone.nii.gz: does not exist" in report.failed[0][1]

    def test_cases_of_one_name_are_reported_and_the_others_done(self, folder, tmp_path, model):
        other = shutil.copytree(folder, tmp_path / "other")
        (other / "case1_image.nii.gz").rename(other / "case3_image.nii.gz")
        report = engine.predict([folder, other], model, tmp_path / "m", config())
        assert names(report) == ["case1_mask.nii.gz", "case3_mask.nii.gz"]
        lines = [line for _, line in report.failed if "gives the same name" in line]
        assert len(lines) == 2 and all(str(folder) in line for line in lines)

    def test_an_image_that_is_named_twice_is_done_once(self, folder, tmp_path, model):
        (tmp_path / "link").symlink_to(folder)
        again = [folder, folder / ".." / folder.name, tmp_path / "link"]
        report = engine.predict(again, model, tmp_path / "m", config())
        assert names(report) == [f"case{n}_mask.nii.gz" for n in range(3)] and not report.failed

    def test_no_image(self, tmp_path, model):
        (tmp_path / "list.txt").write_text("\n")
        with pytest.raises(engine.InputError, match=r"list.txt: no image was found"):
            engine.predict(tmp_path / "list.txt", model, tmp_path / "m", config())

    @pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "1")])
    def test_no_rank_of_a_world(self, folder, tmp_path, model, monkeypatch, rank, world):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(engine.InputError, match="RANK, WORLD_SIZE: are"):
            engine.predict(folder, model, tmp_path / "m", config())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("accumulate", "ram"),
            ("precision", "bfloat16"),
            ("batch_size", 0),
            ("mirror_axes", (3,)),
            ("rcu_threshold", 1.5),
            ("min_lesion_mm3", -1.0),
            ("memory_gb", -1.0),
        ],
    )
    def test_settings_out_of_range(self, folder, tmp_path, model, name, value):
        with pytest.raises(engine.InputError, match=f"^{name}: is"):
            engine.predict(folder, model, tmp_path / "m", config(**{name: value}))


class TestResults:
    def test_is_sigmoid_restore_and_threshold(self, folder, tmp_path, model):
        """The whole-volume way, step by step."""
        engine.predict(folder, model, tmp_path / "m", config(probabilities=True))
        network = build(train_config(use_rcu=False), 2)
        network.load_state_dict(load_file(model))
        preprocessing = Preprocessing(engine.DataConfig())
        image = preprocessing.image(read_volume(folder / "case0_image.nii.gz"))
        with torch.no_grad():
            logits = predict_logits(
                network.eval(), image, None, (16, 16, 8), torch.device("cpu"), 0.5
            )
        expected = preprocessing.restore(torch.sigmoid(logits), image)[..., 0]
        found = probability(tmp_path / "m")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.array_equal(load(tmp_path / "m/case0_mask.nii.gz"), found >= 0.5)

    @pytest.mark.parametrize("where", ["device", "cpu", "disk"])
    def test_where_volumes_are_changes_nothing(self, folder, tmp_path, where):
        autoencoders = make_autoencoders(tmp_path)
        model = make_model(tmp_path / "rcu.safetensors", use_rcu=True)
        image = folder / "case0_image.nii.gz"
        results = []
        for kind in ("auto", where):
            settings = config(probabilities=True, accumulate=kind)
            settings.residuals.accumulate = kind
            engine.predict(image, model, tmp_path / kind, settings, autoencoders)
            results.append(probability(tmp_path / kind))
        assert np.array_equal(*results)

    def test_half_precision_rounds(self, folder, tmp_path):
        autoencoders = make_autoencoders(tmp_path)
        model = make_model(tmp_path / "rcu.safetensors", use_rcu=True)
        image = folder / "case0_image.nii.gz"
        settings = config(probabilities=True)
        engine.predict(image, model, tmp_path / "full", settings, autoencoders)
        settings.precision = settings.residuals.precision = "float16"
        engine.predict(image, model, tmp_path / "half", settings, autoencoders)
        difference = np.abs(probability(tmp_path / "full") - probability(tmp_path / "half"))
        assert 0 < difference.max() < 2e-3

    def test_an_ensemble_is_the_mean(self, folder, tmp_path):
        models = [make_model(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
        settings = config(probabilities=True, uncertainty=True)
        engine.predict(folder, models, tmp_path / "all", settings)
        each = []
        for index, path in enumerate(models):
            engine.predict(folder, path, tmp_path / str(index), settings)
            each.append(probability(tmp_path / str(index)))
        mean = probability(tmp_path / "all")
        assert np.abs(each[0] - each[1]).max() > 0.01
        np.testing.assert_allclose(mean, np.mean(each, axis=0), atol=1e-6)
        bits = nib.load(tmp_path / "all/case0_uncertainty.nii.gz")
        p = mean.astype(np.float64)
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        assert bits.get_data_dtype() == np.float32
        np.testing.assert_allclose(bits.get_fdata(), entropy, atol=1e-5)

    def test_an_ensemble_has_one_preprocessing(self, folder, tmp_path, model):
        other = make_model(tmp_path / "o.safetensors", data=engine.DataConfig(intensity="window"))
        with pytest.raises(engine.InputError, match=r"o.safetensors: was trained with other prep"):
            engine.predict(folder, [model, other], tmp_path / "m", config())

    def test_models_that_do_not_belong_together_say_in_what(self, folder, tmp_path, model):
        """Before any case is read: which setting, which number."""
        data = engine.DataConfig(intensity="window", spacing=(2.0, 2.0, 2.0))
        other = make_model(tmp_path / "o.safetensors", data=data)
        message = r"o.safetensors: .* than .*: spacing \[2.0, 2.0, 2.0\], not None, intensity"
        with pytest.raises(engine.InputError, match=message):
            engine.predict(folder, [model, other], tmp_path / "m", config())
        paths = make_autoencoders(tmp_path)
        unit = make_model(tmp_path / "rcu.safetensors", use_rcu=True, data=data)
        with pytest.raises(engine.InputError, match=r"segmentation model: spacing None, not \["):
            engine.predict(folder, unit, tmp_path / "m", config(), paths)
        unit = make_model(tmp_path / "rcu.safetensors", use_rcu=True)
        with pytest.raises(engine.InputError, match="takes 2 residual maps, and there are 1 auto"):
            engine.predict(folder, unit, tmp_path / "m", config(), paths[:1])
        assert not (tmp_path / "m").exists()

    def test_mirroring_is_the_mean_over_mirrored_images(self, tmp_path, model):
        """In one window, mirroring the image and its result back is what mirroring means."""
        image, _ = blob(0, (16, 16, 8))
        settings = config(probabilities=True)
        expected = []
        for index, axes in enumerate([(), (0,), (2,), (0, 2)]):
            path = write(tmp_path / f"{index}.nii.gz", np.flip(image, axes), np.eye(4))
            engine.predict(path, model, tmp_path / "each", settings)
            expected.append(np.flip(probability(tmp_path / "each", str(index)), axes))
        assert np.abs(expected[0] - expected[1]).max() > 1e-3
        settings.mirror_axes = (0, 2)
        engine.predict(tmp_path / "0.nii.gz", model, tmp_path / "mean", settings)
        found = probability(tmp_path / "mean", "0")
        np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-5)

    def test_mirror_axes_are_those_of_the_patient(self, tmp_path, model):
        """Left and right are axis 0 whatever the order in the file."""
        image, _ = blob(0, (16, 16, 8))
        turned = np.array([[0, -1.0, 0, 3], [0, 0, 1.0, 4], [1.0, 0, 0, 5], [0, 0, 0, 1]])
        back = nib.orientations.ornt_transform(
            nib.io_orientation(np.eye(4)), nib.io_orientation(turned)
        )
        write(tmp_path / "a.nii.gz", image, np.eye(4))
        write(tmp_path / "b.nii.gz", nib.orientations.apply_orientation(image, back), turned)
        settings = config(probabilities=True, mirror_axes=(0,))
        for name in ("a", "b"):
            engine.predict(tmp_path / f"{name}.nii.gz", model, tmp_path / "m", settings)
        one, two = (probability(tmp_path / "m", name) for name in ("a", "b"))
        two = nib.orientations.apply_orientation(two, nib.io_orientation(turned))
        np.testing.assert_allclose(one, two, atol=1e-6)

    def test_rcu_threshold_reaches_the_network(self, folder, tmp_path):
        autoencoders = make_autoencoders(tmp_path)
        model = make_model(tmp_path / "rcu.safetensors", use_rcu=True)
        image = folder / "case0_image.nii.gz"
        results = []
        for threshold in (0.0, 1e-9, 1.0):
            settings = config(probabilities=True, rcu_threshold=threshold)
            out = tmp_path / str(threshold)
            engine.predict(image, model, out, settings, autoencoders)
            results.append(probability(out))
        np.testing.assert_allclose(results[0], results[1], atol=1e-5)
        assert np.abs(results[0] - results[2]).max() > 1e-4

    def test_air_has_no_lesion(self, tmp_path, model):
        image = np.zeros((40, 20, 12), np.float32)
        image[:10] = blob(0, (10, 20, 12))[0]
        path = write(tmp_path / "a.nii.gz", image, np.eye(4))
        settings = config(probabilities=True, skip_air=True, threshold=0.01)
        engine.predict(path, model, tmp_path / "m", settings)
        found = probability(tmp_path / "m", "a")
        assert (found[26:] == 0).all() and (found[:10] > 0).all()

    def test_small_components_are_removed(self, tmp_path):
        mask = np.zeros((20, 20, 20), np.uint8)
        mask[2:5, 2:5, 2:5] = 1  # 27 voxels
        mask[5, 5, 5] = 1  # touches it at a corner: 28
        mask[10:13, 10:13, 10:13] = 1  # 27
        mask[0, 19, 19] = 1
        memory = Scratch(tmp_path, "disk", 0)
        expected = mask.copy()
        expected[10:13, 10:13, 10:13] = expected[0, 19, 19] = 0
        assert remove_small(mask, 2.0, 56.0, memory) == 2  # 28 voxels of 2 mm^3
        assert np.array_equal(mask, expected)
        assert remove_small(mask, 2.0, 57.0, memory) == 1 and not mask.any()

    def test_clean_up_counts_in_cubic_millimeters(self, folder, tmp_path, model):
        image = folder / "case0_image.nii.gz"
        settings = config(probabilities=True)
        engine.predict(image, model, tmp_path / "p", settings)
        # A few voxels alone: what is left must be as large as was asked.
        settings.threshold = float(np.quantile(probability(tmp_path / "p"), 0.98))
        voxel = float(abs(np.linalg.det(nib.load(image).affine[:3, :3])))
        masks = []
        for least in (0.0, 4.5 * voxel):
            settings.min_lesion_mm3 = least
            engine.predict(image, model, tmp_path / "m", settings)
            masks.append(load(tmp_path / "m/case0_mask.nii.gz"))
        assert masks[0].sum() > 0 and (masks[1] <= masks[0]).all()
        expected = masks[0].copy()
        remove_small(expected, voxel, 4.5 * voxel, Scratch(tmp_path, "cpu", 0))
        assert np.array_equal(masks[1], expected)


NIBABEL = Path(nib.__file__).parent / "tests" / "data"
FILES = {
    "anatomical.nii": ">i2, left-anterior-superior",
    "reoriented_anat_moved.nii": ">f4",
    "resampled_anat_moved.nii": ">f4, three slices",
    "example4d.nii.gz": "anisotropic, oblique, the first of two volumes",
    "example_nifti2.nii.gz": "NIfTI-2, the first of two volumes",
}
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "xyzt_units"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


@pytest.mark.skipif(not NIBABEL.is_dir(), reason="nibabel was installed without its test files")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spacing", [None, (5.0, 5.0, 5.0)])
def test_geometry_is_kept_to_the_bit(tmp_path, name, spacing):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    shutil.copy(NIBABEL / name, path)
    source = nib.load(path)
    if source.ndim == 4:
        nib.save(source.slicer[:40, :32, :, 0], path)
    elif source.get_data_dtype().kind == "f":  # some voxels are not a number
        nib.save(type(source)(np.nan_to_num(np.asarray(source.dataobj)), None, source.header), path)
    source = nib.load(path)
    model = make_model(tmp_path / "m.safetensors", data=engine.DataConfig(spacing=spacing))
    settings = config(probabilities=True, threshold=0.4)
    report = engine.predict(path, model, tmp_path / "out", settings)
    assert not report.failed
    for kind in ("mask", "probability"):
        found = nib.load(
            tmp_path / f"out/{name.removesuffix('.gz').removesuffix('.nii')}_{kind}.nii.gz"
        )
        assert type(found) is type(source) and found.shape == source.shape
        assert found.affine.tobytes() == source.affine.tobytes()
        assert nib.aff2axcodes(found.affine) == nib.aff2axcodes(source.affine)
        assert found.header.endianness == source.header.endianness
        for field in GEOMETRY:
            one, two = found.header[field], source.header[field]
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), field
    # The order of the voxels: what lies where in the file is what the network saw there.
    preprocessing = Preprocessing(engine.DataConfig(spacing=spacing))
    volume = read_volume(path)
    assert np.allclose(volume.array, source.get_fdata(), rtol=1e-6)
    image = preprocessing.image(volume)
    network = build(train_config(use_rcu=False), 2)
    network.load_state_dict(load_file(model))
    with torch.no_grad():
        logits = predict_logits(network.eval(), image, None, (16, 16, 8), torch.device("cpu"))
    expected = preprocessing.restore(torch.sigmoid(logits), image)[..., 0]
    np.testing.assert_allclose(np.asarray(found.dataobj), expected, atol=2e-5)

# SPDX-License-Identifier: Apache-2.0
"""Every wrong file is one line that names it and the remedy; the other files are done."""

from __future__ import annotations

import json
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from engine.conftest import (
    AFFINE,
    blob,
    make_autoencoders,
    pretrain_config,
    residuals_config,
    train_config,
    write,
)
from safetensors.torch import save_file

from grcsf_kernels import engine
from grcsf_kernels.common.settings import from_dict
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.io.nifti import read_volume, write_volume
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training.state import load_state


def spoil_nan(folder):
    image, _ = blob(1)
    image[3, 3, 3] = np.nan
    return write(folder / "case1_image.nii.gz", image), "1 voxels that are NaN or Inf"


def spoil_inf(folder):
    image, _ = blob(1)
    image[:2, 0, 0] = np.inf
    return write(folder / "case1_image.nii.gz", image), "2 voxels that are NaN or Inf"


def spoil_axes(folder):
    image, _ = blob(1)
    path = write(folder / "case1_image.nii.gz", np.stack([image, image], axis=-1))
    return path, "has 4 axes"


def spoil_truncate(folder):
    path = folder / "case1_image.nii.gz"
    path.write_bytes(path.read_bytes()[:700])
    return path, "truncated"


def spoil_not_nifti(folder):
    path = folder / "case1_image.nii.gz"
    path.write_text("hello")
    return path, "truncated or no NIfTI"


IMAGE_FAULTS = [spoil_nan, spoil_inf, spoil_axes, spoil_truncate, spoil_not_nifti]


def spoil_affine(folder):
    moved = AFFINE.copy()
    moved[0, 3] += 5
    return write(folder / "case1_label.nii.gz", blob(1)[1], moved), "affine that differs"


def spoil_empty(folder):
    return write(folder / "case1_label.nii.gz", np.zeros((21, 18, 13), np.uint8)), "is empty"


def spoil_labels(folder):
    return write(folder / "case1_label.nii.gz", blob(1)[1] * 3), "has labels 0, 3"


def spoil_shape(folder):
    return write(folder / "case1_label.nii.gz", blob(1)[1][:-1]), "has shape"


def spoil_truncated_label(folder):
    path = folder / "case1_label.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    return path, "truncated"


def spoil_pair(folder):
    (folder / "case1_label.nii.gz").unlink()
    return folder / "case1_image.nii.gz", "has no label"


LABEL_FAULTS = [
    spoil_affine,
    spoil_empty,
    spoil_labels,
    spoil_shape,
    spoil_truncated_label,
    spoil_pair,
]


def check_line(report, path, problem):
    """The one failure is one line with the file, the problem and a remedy."""
    (failure,) = report.failed
    assert str(path) in failure[1] and problem in failure[1]
    assert "\n" not in failure[1] and ";" in failure[1]


@pytest.mark.parametrize("spoil", IMAGE_FAULTS)
def test_bad_image_is_skipped_by_pretrain_residuals_and_predict(folder, tmp_path, spoil):
    good = engine.pretrain(folder, tmp_path / "good", pretrain_config(epochs=1))
    model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
    path, problem = spoil(folder)

    report = engine.Report()
    engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1), report)
    check_line(report, path, problem)

    report = engine.cache_residuals(folder, good, tmp_path / "maps", residuals_config())
    check_line(report, path, problem)
    assert len(report.done) == 2

    report = engine.predict(folder, model, tmp_path / "m", engine.PredictConfig(device="cpu"))
    check_line(report, path, problem)
    assert sorted(p.name for p in report.done) == ["case0_mask.nii.gz", "case2_mask.nii.gz"]
    assert not (tmp_path / "m/case1_mask.nii.gz").exists()


@pytest.mark.parametrize("spoil", LABEL_FAULTS)
def test_bad_label_is_skipped_by_train(folder, tmp_path, spoil):
    path, problem = spoil(folder)
    report = engine.Report()
    written = engine.train(
        folder, tmp_path / "run", train_config(use_rcu=False, epochs=1), report=report
    )
    check_line(report, path, problem)
    assert written.exists()


@pytest.mark.parametrize("spoil", [spoil_affine, spoil_labels, spoil_shape, spoil_pair])
def test_bad_label_is_skipped_by_evaluate(folder, tmp_path, spoil):
    for index in range(3):
        write(tmp_path / f"masks/case{index}_mask.nii.gz", blob(index)[1])
    path, problem = spoil(folder)
    report = engine.Report()
    result = engine.evaluate(tmp_path / "masks", folder, report=report)
    check_line(report, path, problem)
    assert set(result["cases"]) == {"case0", "case2"} and result["mean"]["dice"] == 1


def test_an_empty_label_is_measured(folder, tmp_path):
    """A healthy subject is no fault when measuring: an empty mask on it is right."""
    spoil_empty(folder)
    for index in range(3):
        write(tmp_path / f"masks/case{index}_mask.nii.gz", blob(index)[1] * (index != 1))
    result = engine.evaluate(tmp_path / "masks", folder)
    assert result["cases"]["case1"]["dice"] == 1 and result["cases"]["case1"]["hd95"] is None


def test_volume_smaller_than_the_patch(folder, tmp_path):
    good = engine.pretrain(folder, tmp_path / "good", pretrain_config(epochs=1))
    path = write(folder / "case1_image.nii.gz", blob(1)[0][:, :, :3])
    report = engine.Report()
    engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1), report)
    check_line(report, path, "fewer than the autoencoder's patch (4, 4, 4)")
    report = engine.cache_residuals(folder, good, tmp_path / "maps", residuals_config())
    check_line(report, path, "fewer than the autoencoder's patch")


def test_missing_residual_map(folder, tmp_path):
    good = engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1))
    engine.cache_residuals(folder, good, tmp_path / "maps", residuals_config())
    (tmp_path / "maps/case1_residual.nii.gz").unlink()
    report = engine.Report()
    engine.train(folder, tmp_path / "run", train_config(epochs=1), tmp_path / "maps", report=report)
    (failure,) = report.failed
    assert "case1_residual.nii.gz: does not exist; run grcsf residuals" in failure[1]


def test_label_without_image(folder, tmp_path):
    (folder / "case1_image.nii.gz").unlink()
    report = engine.Report()
    engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1), report=report)
    check_line(report, folder / "case1_label.nii.gz", "has no image")


def test_nothing_usable(folder, tmp_path):
    for path in folder.glob("*_label.nii.gz"):
        path.unlink()
    with pytest.raises(InputError, match="holds no usable case"):
        engine.train(folder, tmp_path / "run", train_config(use_rcu=False))
    with pytest.raises(InputError, match="does not exist"):
        engine.train(tmp_path / "nowhere", tmp_path / "run", train_config(use_rcu=False))


def test_the_layout_with_two_folders(folder, tmp_path):
    for kind in ("image", "label"):
        (tmp_path / f"two/{kind}s").mkdir(parents=True)
        for path in folder.glob(f"*_{kind}.nii.gz"):
            path.rename(tmp_path / f"two/{kind}s" / path.name.replace(f"_{kind}", ""))
    report = engine.Report()
    cases = find_cases(tmp_path / "two", report, labels=True)
    assert [case.name for case in cases] == ["case0", "case1", "case2"] and not report.failed


def test_a_trailing_axis_of_one_is_a_volume(folder, tmp_path):
    write(folder / "case1_image.nii.gz", blob(1)[0][..., None])
    report = engine.Report()
    engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1), report=report)
    assert not report.failed


class TestCheckpoints:
    def test_of_another_kind(self, folder, tmp_path):
        model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
        with pytest.raises(InputError, match=r"contains a GRCSF model, expected a Masked"):
            engine.cache_residuals(folder, [model], tmp_path / "maps", residuals_config())

    def test_of_another_architecture(self, folder, tmp_path):
        model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(model, "pt") as file:
            description = json.loads(file.metadata()["grcsf"])
        description["config"]["channels"] = [4, 8]
        metadata = {"grcsf": json.dumps(description)}
        save_file(load_file(model), tmp_path / "other.safetensors", metadata=metadata)
        with pytest.raises(InputError, match=r"other.safetensors: .* another architecture"):
            load_checkpoint(tmp_path / "other.safetensors", "GRCSF")

    def test_truncated(self, folder, tmp_path):
        model = engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
        model.write_bytes(model.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"model.safetensors: .* truncated"):
            load_checkpoint(model, "GRCSF")

    def test_not_ours(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match="was not written by grcsf"):
            load_checkpoint(tmp_path / "a.safetensors", "GRCSF")
        with pytest.raises(InputError, match="does not exist"):
            load_checkpoint(tmp_path / "b.safetensors", "GRCSF")

    def test_a_state_is_never_unpickled(self, tmp_path):
        """A pickle that runs code when it is loaded does not get to run it."""

        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        for dump in (pickle.dump, torch.save):
            with open(tmp_path / "run.state", "wb") as file:
                dump({"model": Bomb()}, file)
            with pytest.raises(InputError, match="no training state"):
                load_state(tmp_path / "run.state", "")
        assert not (tmp_path / "exploded").exists()

    def test_a_state_of_other_settings(self, folder, tmp_path):
        engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=1))
        with pytest.raises(InputError, match=r"model.state: belongs to a run with other settings"):
            engine.train(folder, tmp_path / "run", train_config(use_rcu=False, epochs=2))

    def test_a_damaged_state(self, folder, tmp_path):
        config = train_config(use_rcu=False, epochs=1)
        engine.train(folder, tmp_path / "run", config)
        state = tmp_path / "run/model.state"
        state.write_bytes(state.read_bytes()[:2000])
        with pytest.raises(InputError, match=r"model.state: is no training state, or a damaged"):
            engine.train(folder, tmp_path / "run", config)


def test_loss_that_is_nan_names_the_batch(folder, tmp_path):
    config = train_config(use_rcu=False, learning_rate=1e30, epochs=1, steps_per_epoch=20)
    config.optimization.clip_norm = 1e30
    with pytest.raises(InputError, match=r"epoch 1, step \d+: the loss is (nan|inf) on case"):
        engine.train(folder, tmp_path / "run", config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": [8, 8, 8]}, "unknown setting 'crop'; expected one of data, model"),
        ({"model": {"chanels": [4]}}, "model: unknown setting 'chanels'"),
        ({"crop_size": [8, 8]}, "crop_size: is .*; expected a list of 3"),
        ({"foreground": "much"}, "foreground: is 'much'; expected float"),
        ({"optimization": {"epochs": True}}, "epochs: is True; expected int"),
        ({"model": {"use_gcu": 1}}, "use_gcu: is 1; expected bool"),
        ([1], "expected a mapping"),
    ],
)
def test_wrong_settings_name_the_key(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(engine.TrainConfig, values, "train.yaml")


def test_settings_survive_yaml(tmp_path):
    config = train_config()
    config.data.spacing = (1.0, 2.0, 3.0)
    engine.save_config(config, tmp_path / "c.yaml")
    assert engine.load_config(engine.TrainConfig, tmp_path / "c.yaml") == config
    (tmp_path / "c.yaml").write_text("model: [")
    with pytest.raises(InputError, match=r"c.yaml: can't be read"):
        engine.load_config(engine.TrainConfig, tmp_path / "c.yaml")


def test_wrong_options(folder, tmp_path):
    for change, message in (
        ({"device": "tpu"}, "device: is 'tpu'; expected auto, cpu or cuda"),
        ({"precision": "8"}, "precision: is '8'"),
    ):
        with pytest.raises(InputError, match=message):
            engine.train(folder, tmp_path / "run", train_config(use_rcu=False, **change))
    with pytest.raises(InputError, match="residuals: missing"):
        engine.train(folder, tmp_path / "run", train_config())
    config = pretrain_config()
    config.crop_size = (18, 16, 8)
    with pytest.raises(InputError, match=r"expected a multiple of model.patch_size"):
        engine.pretrain(folder, tmp_path / "mae", config)


def test_nothing_half_written_when_writing_fails(tmp_path, monkeypatch):
    """A full disk leaves the old file and no temporary one."""
    image, label = blob(0)
    path = write(tmp_path / "a_image.nii.gz", image)
    like = read_volume(path)
    target = tmp_path / "a_mask.nii.gz"
    target.write_text("old")

    def full(image, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_volume(target, label, like)
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_image.nii.gz", "a_mask.nii.gz"]


def test_the_error_crosses_processes() -> None:
    error = InputError("a.nii.gz", "is empty", "leave it out")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.nii.gz: is empty; leave it out"
    assert (copy.where, copy.problem, copy.remedy) == (error.where, error.problem, error.remedy)


class TestTheFirstCase:
    """The first case is the one that differs from the others."""

    def spoil(self, folder, tmp_path):
        """nnU-Net's layout has channels; without dataset.json each case has those it has."""
        data = tmp_path / "channels"
        for index in range(3):
            image = blob(index)[0]
            for channel in range(1 if index == 0 else 2):
                write(data / f"case{index}_000{channel}.nii.gz", image * (channel + 1))
        return data

    def test_most_cases_decide_on_the_number_of_channels(self, folder, tmp_path):
        data = self.spoil(folder, tmp_path)
        report = engine.Report()
        paths = engine.pretrain(data, tmp_path / "mae", pretrain_config(epochs=1), report)
        check_line(report, data / "case0_0000.nii.gz", "has 1 channel(s), and the others have 2")
        assert load_checkpoint(paths[0], "MaskedAutoencoder").model.in_channels == 2

    @pytest.mark.parametrize("described", [True, False])
    def test_most_cases_decide_on_the_number_of_maps(self, folder, tmp_path, described):
        autoencoders = make_autoencoders(tmp_path)
        engine.cache_residuals(folder, autoencoders, tmp_path / "maps", residuals_config())
        maps = tmp_path / "maps/case0_residual.nii.gz"
        image = nib.load(maps)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., :1], image.affine), maps)
        if not described:
            (tmp_path / "maps/residuals.json").unlink()
        report = engine.Report()
        model = engine.train(
            folder, tmp_path / "run", train_config(epochs=1), tmp_path / "maps", report
        )
        check_line(
            report, folder / "case0_image.nii.gz", "has 1 residual maps, and the others have 2"
        )
        assert load_checkpoint(model, "GRCSF").model.num_maps == 2

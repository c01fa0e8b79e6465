# SPDX-License-Identifier: Apache-2.0
"""The ``grcsf`` command, as a user types it."""

from __future__ import annotations

import nibabel as nib
import pytest
from engine.conftest import blob, pretrain_config, train_config, write
from support import run_python
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli.commands import app


@pytest.fixture
def folder(tmp_path):
    for index in range(2):
        image, label = blob(index)
        write(tmp_path / f"data/case{index}_image.nii.gz", image)
        write(tmp_path / f"data/case{index}_label.nii.gz", label)
    engine.save_config(pretrain_config(), tmp_path / "pretrain.yaml")
    engine.save_config(train_config(), tmp_path / "train.yaml")
    return tmp_path


def grcsf(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_the_whole_way(folder):
    data = folder / "data"
    grcsf("pretrain", data, "-o", folder / "mae", "-c", folder / "pretrain.yaml")
    maes = ("-a", folder / "mae/mae_50.safetensors", "-a", folder / "mae/mae_75.safetensors")
    grcsf("residuals", data, "-o", folder / "maps", *maes, "--device", "cpu")
    grcsf(
        "train",
        data,
        "-o",
        folder / "run",
        "--residuals",
        folder / "maps",
        "-c",
        folder / "train.yaml",
        "--epochs",
        1,
    )
    model = folder / "run/model.safetensors"
    one = data / "case0_image.nii.gz"
    grcsf("predict", one, "-m", model, "-o", folder / "m", *maes, "--probabilities")
    assert {p.name for p in (folder / "m").iterdir()} == {
        "case0_mask.nii.gz",
        "case0_probability.nii.gz",
    }
    grcsf("predict", data, "-m", model, "-o", folder / "m", "--residuals", folder / "maps")
    result = grcsf("evaluate", folder / "m", data)
    assert "Dice" in result.output and "case1" in result.output and "mean" in result.output
    assert (folder / "m/evaluation.json").exists()
    assert (
        engine.load_config(engine.TrainConfig, folder / "run/train.yaml").optimization.epochs == 1
    )


def test_a_bad_file_is_skipped_and_the_status_is_1(folder):
    data = folder / "data"
    config = train_config(use_rcu=False)
    engine.save_config(config, folder / "train.yaml")
    grcsf("train", data, "-o", folder / "run", "-c", folder / "train.yaml")
    (data / "broken_image.nii.gz").write_bytes(b"no volume")
    model = folder / "run/model.safetensors"
    result = grcsf("predict", data, "-m", model, "-o", folder / "m", status=1)
    assert "broken_image.nii.gz" in result.output and "1 input(s) skipped" in result.output
    assert len(list((folder / "m").glob("*_mask.nii.gz"))) == 2
    assert nib.load(folder / "m/case1_mask.nii.gz").shape == (21, 18, 13)


def test_an_error_is_one_line_without_a_traceback(folder):
    result = grcsf("pretrain", folder / "nowhere", "-o", folder / "run", status=1)
    assert result.output == f"error: {folder / 'nowhere'}: does not exist; check the path\n"


@pytest.mark.parametrize("command", ["pretrain", "residuals", "train", "predict"])
def test_config_prints_all_settings(command, tmp_path):
    text = grcsf("config", command).output
    (tmp_path / "all.yaml").write_text(text)
    name = {"residuals": "ResidualsConfig"}.get(command, f"{command.capitalize()}Config")
    config = getattr(engine, name)
    assert engine.load_config(config, tmp_path / "all.yaml") == config()


def test_help_names_every_command():
    output = grcsf("--help").output
    for command in (
        "pretrain",
        "residuals",
        "train",
        "predict",
        "evaluate",
        "export",
        "doctor",
        "demo",
        "config",
    ):
        assert command in output


def test_doctor_needs_no_extra():
    """With the packages of the extra hidden doctor runs, and the others say what to install."""
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'monai', 'nibabel', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from grcsf_kernels.cli import main\n"
        "sys.argv = ['grcsf', sys.argv[1]]\n"
        "main()\n"
    )

    doctor = run_python(code, "doctor")
    assert doctor.returncode == 0 and "Backends" in doctor.stdout, doctor.stderr
    train = run_python(code, "train")
    assert train.returncode == 1
    assert 'pip install "grcsf-kernels[train]"' in train.stderr and "Traceback" not in train.stderr

# SPDX-License-Identifier: Apache-2.0
"""The ``grcsf`` command when something is wrong, and when its process is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from signal import SIGKILL

import pytest
import torch
from engine.conftest import blob, pretrain_config, train_config, write
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli.commands import app

COMMANDS = ("pretrain", "residuals", "train", "predict", "evaluate", "config", "doctor", "demo")
MAIN = "from grcsf_kernels.cli import main; main()"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        image, label = blob(index)
        write(tmp_path / f"data/case{index}_image.nii.gz", image)
        write(tmp_path / f"data/case{index}_label.nii.gz", label)
    engine.save_config(pretrain_config(epochs=1), tmp_path / "pretrain.yaml")
    engine.save_config(train_config(epochs=1), tmp_path / "train.yaml")
    return tmp_path


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


def test_errors_are_one_line(folder):
    for arguments, message in (
        (
            ["evaluate", folder / "data", folder / "nowhere"],
            "nowhere: does not exist; check the path",
        ),
        (["train", folder / "data", "-c", folder / "no.yaml"], "no.yaml: can't be read"),
        (["train", folder / "data"], "residuals: missing; run grcsf residuals first"),
        (["residuals", folder / "data"], "autoencoders: none were given; name the files"),
        (["predict", folder / "data", "-m", folder / "no"], "no: does not exist; check the path"),
    ):
        run = call(*arguments, "-o", folder / "out")
        assert run.exit_code == 1 and isinstance(run.exception, SystemExit)
        assert last_line(run).startswith("error: ") and message in last_line(run)


def test_an_output_that_is_a_file_is_one_line(folder):
    engine.save_config(train_config(use_rcu=False, epochs=1), folder / "train.yaml")
    run = call("train", folder / "data", "-o", folder / "train.yaml", "-c", folder / "train.yaml")
    assert run.exit_code == 1 and isinstance(run.exception, SystemExit)
    assert "train.yaml: is a file; expected a folder" in last_line(run)


def test_options_come_before_the_file(folder):
    engine.save_config(train_config(use_rcu=False, epochs=5), folder / "train.yaml")
    call(
        *("train", folder / "data", "-o", folder / "run", "-c", folder / "train.yaml"),
        *("--epochs", 1, "--seed", 7),
    )
    used = engine.load_config(engine.TrainConfig, folder / "run/train.yaml")
    assert (used.optimization.epochs, used.optimization.seed) == (1, 7)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    run = call(command, "--help")
    assert run.exit_code == 0 and "Usage" in run.stdout


def test_a_process_that_was_killed_goes_on_to_the_same_bytes(folder):
    """SIGKILL in a real process, in the middle of an epoch; then the same call again."""
    config = train_config(use_rcu=False, epochs=4, steps_per_epoch=12)
    config.validation_fraction, config.validation_every = 0.34, 2
    engine.save_config(config, folder / "train.yaml")
    whole = engine.train(folder / "data", folder / "whole", config)
    command = [sys.executable, "-c", MAIN, "train", str(folder / "data")]
    command += ["-o", str(folder / "part"), "-c", str(folder / "train.yaml")]
    state = folder / "part/model.state"
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not state.exists():
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert process.returncode == -SIGKILL, "it ended before it could be killed"
    assert torch.load(state, weights_only=True)["done"] < 4 * 12
    part = engine.train(folder / "data", folder / "part", config)
    assert part.read_bytes() == whole.read_bytes()

# SPDX-License-Identifier: Apache-2.0
"""Whatever a command's function raises is one line and an exit status; so are wrong options."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from signal import SIGTERM

import pytest
import torch
from engine.conftest import blob, make_model, train_config, write
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli import commands
from grcsf_kernels.cli.commands import app
from grcsf_kernels.cli.guard import Terminated, explain

MAIN = "from grcsf_kernels.cli import main; main()"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments, **options):
    """A real ``grcsf`` process."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    for index in range(2):
        image, label = blob(index)
        write(tmp_path / f"data/case{index}_image.nii.gz", image)
        write(tmp_path / f"data/case{index}_label.nii.gz", label)
    return tmp_path


def one_line(run, status):
    """The only line on the standard error of a run, which wrote nothing else."""
    assert run.exit_code == status, run.output
    assert isinstance(run.exception, SystemExit) and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a\nb"), "grcsf config: ValueError: a b"),
        (RuntimeError("sizes differ"), "grcsf config: RuntimeError: sizes differ"),
        (RecursionError("too deep"), "grcsf config: RecursionError: too deep"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "grcsf config: UnicodeDecodeError"),
        (AssertionError(), "grcsf config: AssertionError (in test_cli_guard.py, line"),
        (KeyError("\x1b[31m"), "grcsf config: KeyError: '\\x1b[31m'"),
        (SystemError("odd"), "report it with the traceback, which GRCSF_TRACEBACK=1 shows"),
        (MemoryError(), "grcsf config: memory ran out (MemoryError); lower batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out (OutOfMemoryError: CUDA"),
        (RuntimeError("[enforce] can't allocate memory: you"), "config: memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device", "a.nii"), "a.nii: No space left"),
        (OSError("odd"), "grcsf config: odd; check the path"),
        (engine.InputError("a\n[b]", "is odd", "mend it"), "error: a\\n[b]: is odd; mend it"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_whatever_is_raised_is_one_line(error, words, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(commands, "dump_config", fail)
    assert words in one_line(call("config", "train"), 1)
    monkeypatch.setenv("GRCSF_TRACEBACK", "1")
    run = call("config", "train")
    assert "Traceback (most recent call last)" in run.stderr and words in run.stderr


def test_what_only_stops_a_command():
    assert (
        explain(KeyboardInterrupt(), "x")[1] == 130
        and "interrupted" in explain(Terminated(), "x")[0]
    )
    assert explain(Terminated(), "x")[1] == 143
    assert explain(BrokenPipeError(), "x") == ("", 141)


def test_a_process_that_is_not_the_first_says_which_it_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert explain(ValueError("x"), "grcsf train")[0].startswith("error in process 3: grcsf train")


def test_a_process_that_gets_sigterm_stops_as_with_ctrl_c(folder):
    """It says so, and leaves nothing behind but its state."""
    engine.save_config(train_config(use_rcu=False, epochs=500), folder / "train.yaml")
    arguments = ("train", folder / "data", "-o", folder / "run", "-c", folder / "train.yaml")
    state = folder / "run/model.state"
    with process(*arguments) as running:
        while running.poll() is None and not state.exists():
            time.sleep(0.01)
        running.send_signal(SIGTERM)
        _, said = running.communicate()
    said = said.decode()
    assert running.returncode == 128 + SIGTERM, said
    assert said.rstrip().endswith(
        "interrupted: finished cases are kept; run the same command again to resume"
    )
    assert "Traceback" not in said


def test_a_reader_that_has_gone_is_no_error():
    with process("config", "train") as running:
        running.stdout.close()  # as `| head -n 0` does
        said = running.stderr.read().decode()
        running.wait()
    assert running.returncode == 141 and said == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "data", "-o", "run", "--epochs", "many"], "--epochs"),
        (["train", "data", "-o", "run", "--fold"], "--fold"),
        (["train", "data", "-o", "run", "--wrong", "1"], "--wrong"),
        (["train"], "grcsf train --help shows what there is"),
        (["predict", "a.nii", "-o", "x"], "--model"),
        (["evaluate", "a", "b", "c"], "grcsf evaluate --help"),
        (["config", "everything"], "everything"),
        (["train", "data", "-o", "run", "--preset", "tiny"], "tiny"),
        (["segment"], "No such command 'segment'"),
        (["--wrong"], "No such option"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, words):
    assert words in one_line(call(*arguments), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1"], "seed: is -1; expected from 0 to 4294967295"),
        (["--seed", str(2**64)], "seed: is 18446744073709551616; expected"),
        (["--epochs", "0"], "epochs: is 0; expected above 0"),
        (["--device", "tpu"], "device: is 'tpu'; expected auto, cpu or cuda"),
        (["--fold", "-1"], "fold: is -1; expected 0 or more"),
        (["--fold", "1"], "fold: is 1; set folds or splits_file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_an_option_out_of_range_is_one_line_and_nothing_is_written(options, words, folder):
    engine.save_config(train_config(use_rcu=False), folder / "train.yaml")
    run = call("train", folder / "data", "-o", folder / "o", "-c", folder / "train.yaml", *options)
    assert words in one_line(run, 1)
    assert not (folder / "o").exists()


@pytest.mark.parametrize("threshold", ["nan", "inf", "0", "1", "-1"])
def test_a_threshold_that_is_none_is_refused(threshold, folder):
    model = make_model(folder / "model.safetensors")
    run = call(
        "predict", folder / "data", "-m", model, "-o", folder / "o", "--threshold", threshold
    )
    assert "threshold: is" in one_line(run, 1) and not (folder / "o").exists()


COMMANDS = {
    "pretrain": ["{data}"],
    "residuals": ["{data}", "-a", "{model}"],
    "train": ["{data}", "-c", "{config}"],
    "predict": ["{data}", "-m", "{model}"],
    "evaluate": ["{masks}", "{data}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_can_not_be_a_folder_is_one_line(command, folder):
    engine.save_config(train_config(use_rcu=False), folder / "train.yaml")
    (folder / "masks").mkdir()
    paths = {
        "data": folder / "data",
        "model": make_model(folder / "model.safetensors"),
        "config": folder / "train.yaml",
        "masks": folder / "masks",
    }
    arguments = [text.format(**paths) for text in COMMANDS[command]]
    before = sorted(folder.rglob("*"))
    for output, words in (
        (folder / "train.yaml", "is a file; expected a folder"),
        (folder / "one.nii.gz", "is the name of a file; expected a folder"),
        (folder / "train.yaml/run", "is a file; name a folder"),
        (folder / "data", "is the folder of the input; name another one"),
        (folder / "data/../data", "is the folder of the input; name another one"),
    ):
        assert words in one_line(call(command, *arguments, "-o", output), 1)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_read_only_is_one_line(folder):
    (folder / "kept").mkdir(mode=0o500)
    run = call("pretrain", folder / "data", "-o", folder / "kept/run")
    assert "kept is read-only" in one_line(run, 1)


@pytest.mark.parametrize("command", ["pretrain", "residuals", "predict"])
def test_an_input_that_does_not_exist_is_one_line(command, folder):
    model = make_model(folder / "model.safetensors")
    more = {"residuals": ["-a", model], "predict": ["-m", model]}.get(command, [])
    run = call(command, folder / "nowhere", "-o", folder / "out", *more)
    assert "nowhere" in one_line(run, 1) or "model.safetensors" in run.stderr


def test_the_version_is_printed():
    run = call("--version")
    assert run.exit_code == 0 and run.stdout == f"grcsf-kernels {commands.__version__}\n"


def test_a_package_that_is_damaged_is_one_line(tmp_path):
    """An import that fails, whatever it raises, names the package and the remedy."""
    (tmp_path / "nibabel").mkdir()
    (tmp_path / "nibabel/__init__.py").write_text("raise RuntimeError('half\\ninstalled')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with process("config", "train", env=os.environ | {"PYTHONPATH": path}) as running:
        _, said = running.communicate()
    (line,) = said.decode().splitlines()
    assert running.returncode == 1 and "RuntimeError: half installed" in line
    assert "pip install" in line and "grcsf doctor" in line

# SPDX-License-Identifier: Apache-2.0
"""Many calls of every command's function in one process leave nothing behind.

A few in the test suite; a thousand by ``make long-life``.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from engine.conftest import (
    make_autoencoders,
    make_model,
    predict_config,
    pretrain_config,
    residuals_config,
    train_config,
)

from grcsf_kernels import engine
from grcsf_kernels.engine.inference.export import export_model

CALLS = int(os.environ.get("GRCSF_LONG_LIFE", "2"))
SHORT = {"epochs": 1, "steps_per_epoch": 1}
# Kilobytes a call, and once: allocators keep some of what they had.
GROWTH, ONCE = 8, 40_000


class Left:
    """What this process has now: threads, descriptors, temporary files, resident memory."""

    def __init__(self, scratch: Path) -> None:
        gc.collect()
        self.threads = sorted(thread.name for thread in threading.enumerate())
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.files = sorted(path.name for path in scratch.iterdir())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.kilobytes = pages * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def pretrain(folder, tmp_path):
    engine.pretrain(folder, tmp_path / "out", pretrain_config(**SHORT))


def train(folder, tmp_path):
    config = train_config(use_rcu=False, **SHORT)
    config.validation_fraction, config.overlays = 0.34, 1
    engine.train(folder, tmp_path / "out", config)


def train_with_cache_and_workers(folder, tmp_path):
    config = train_config(use_rcu=False, workers=1, cache_dir=str(tmp_path / "out/cache"), **SHORT)
    engine.train(folder, tmp_path / "out", config)


def residuals(folder, tmp_path):
    paths = [tmp_path / f"mae_{ratio}.safetensors" for ratio in (0.5, 0.75)]
    engine.cache_residuals(folder, paths, tmp_path / "out", residuals_config())


def predict(folder, tmp_path):
    config = predict_config(probabilities=True, accumulate="disk")
    engine.predict(folder, tmp_path / "model.safetensors", tmp_path / "out", config)


def evaluate(folder, tmp_path):
    engine.evaluate(tmp_path / "masks", folder, tmp_path / "out")


def refused(folder, tmp_path):
    with pytest.raises(engine.InputError):
        engine.train(folder / "nothing", tmp_path / "out", train_config(use_rcu=False))


def export(folder, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(tmp_path / "model.safetensors", tmp_path / "out/model.pt2")


COMMANDS = [
    pretrain,
    train,
    train_with_cache_and_workers,
    residuals,
    predict,
    evaluate,
    refused,
    *([export] if CALLS > 9 else []),  # 15 seconds a call
]


@pytest.mark.parametrize("command", COMMANDS)
def test_many_calls_leave_nothing_behind(folder, tmp_path, scratch, command):
    make_model(tmp_path / "model.safetensors")
    make_autoencoders(tmp_path)
    (tmp_path / "masks").mkdir()
    for label in folder.glob("*_label.nii.gz"):
        name = label.name.replace("_label", "_mask")
        shutil.copy(label, tmp_path / "masks" / name)

    def call():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command(folder, tmp_path)

    # What is imported, compiled and kept once is no leak.
    warm = max(1, CALLS // 10)
    for _ in range(warm):
        call()
    before = Left(scratch)
    for _ in range(CALLS):
        call()
    after = Left(scratch)
    grown = after.kilobytes - before.kilobytes
    print(f"{command.__name__}: {grown} kB in {CALLS} calls")
    assert after.threads == before.threads
    assert after.descriptors <= before.descriptors
    assert after.files == before.files
    assert grown < ONCE + GROWTH * CALLS

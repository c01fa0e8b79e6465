# SPDX-License-Identifier: Apache-2.0
"""Prediction over many cases: shards, resumption, and what goes wrong with one of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
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
    residuals_config,
    write,
)
from engine.conftest import predict_config as config
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli.commands import app

sys_modules_predict = sys.modules["grcsf_kernels.engine.inference.predict"]


def names(report):
    return [path.name for path in report.done]


class TestResumption:
    def test_ranks_share_the_cases(self, folder, tmp_path, model, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        shares = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            shares.append(names(engine.predict(folder, model, tmp_path / "m", config())))
        assert shares == [["case0_mask.nii.gz", "case2_mask.nii.gz"], ["case1_mask.nii.gz"]]

    def test_what_is_finished_is_kept(self, folder, tmp_path, model, monkeypatch):
        out, written = tmp_path / "m", []
        original = sys_modules_predict.write_volume

        def count(path, *args):
            written.append(path.name)
            return original(path, *args)

        monkeypatch.setattr(sys_modules_predict, "write_volume", count)

        def again(**options):
            written.clear()
            overwrite = options.pop("overwrite", False)
            model_ = options.pop("model", model)
            report = engine.predict(folder, model_, out, config(**options), overwrite=overwrite)
            assert len(report.done) == 3 and not report.failed
            return sorted({name[:5] for name in written})

        everything = ["case0", "case1", "case2"]
        assert again() == everything
        assert again() == []
        assert again(batch_size=1, accumulate="disk") == []  # the same masks
        assert again(overwrite=True) == everything
        assert again(threshold=0.4) == everything
        assert again(threshold=0.4) == []
        assert again(threshold=0.4, probabilities=True) == everything  # an output is missing
        assert again(threshold=0.4, probabilities=True) == []
        assert again(threshold=0.4) == []
        other = make_model(tmp_path / "other.safetensors", 1)
        assert again(threshold=0.4, model=other) == everything
        # Not whole, not there, of another image.
        mask = out / "case1_mask.nii.gz"
        mask.write_bytes(mask.read_bytes()[:-20])
        (out / "case2_mask.nii.gz").unlink()
        assert again(threshold=0.4, model=other) == ["case1", "case2"]
        write(folder / "case0_image.nii.gz", blob(7)[0])
        assert again(threshold=0.4, model=other) == ["case0"]

    def test_a_killed_run_goes_on_to_the_same_masks(self, folder, tmp_path, model):
        """SIGKILL while the second mask is half written."""
        unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
        engine.predict(folder, model, unbroken, config())
        script = f"""
import os, signal
from pathlib import Path
import nibabel
from grcsf_kernels import engine
save, calls = nibabel.save, []
def half(image, name):
    save(image, name)
    calls.append(name)
    if len(calls) == 2:
        Path(name).write_bytes(Path(name).read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
nibabel.save = half
engine.predict(Path({str(folder)!r}), Path({str(model)!r}), Path({str(broken)!r}),
               engine.PredictConfig(device="cpu", accumulate="disk"))
"""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
        left = sorted(path.name for path in broken.iterdir())
        assert len(left) == 2 and left[1] == "case0_mask.nii.gz"
        assert left[0].startswith(".grcsf-") and left[0].endswith(".tmp")
        before = (broken / "case0_mask.nii.gz").stat().st_mtime_ns
        report = engine.predict(folder, model, broken, config())
        assert len(report.done) == 3
        assert (broken / "case0_mask.nii.gz").stat().st_mtime_ns == before
        files = sorted(path.name for path in unbroken.iterdir())
        assert sorted(path.name for path in broken.iterdir()) == files
        for name in files:
            assert np.array_equal(load(broken / name), load(unbroken / name))

    def test_residual_maps_are_resumed_too(self, folder, tmp_path, monkeypatch):
        autoencoders = make_autoencoders(tmp_path)
        out = tmp_path / "maps"
        engine.cache_residuals(folder, autoencoders, out, residuals_config())
        (out / "case1_residual.nii.gz").unlink()
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        report = engine.cache_residuals(folder, autoencoders, out, residuals_config())
        after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        assert len(report.done) == 3 and before.items() < after.items()


class TestFaults:
    def test_a_corrupt_file_among_good_ones_under_torchrun(self, folder, tmp_path, model):
        """The first process meets it and is done early: the other must not be ended with it."""
        path = folder / "case0_image.nii.gz"
        path.write_bytes(path.read_bytes()[:700])
        late = f"""
import os, time
from pathlib import Path
while os.environ["RANK"] == "1" and not Path({str(tmp_path / "m/case2_mask.nii.gz")!r}).exists():
    time.sleep(0.1)
time.sleep(4 * int(os.environ["RANK"]))
from grcsf_kernels.cli import main
main()
"""
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--no-python", sys.executable, "-c"),
            *(late, "predict", folder),
            *("-m", model, "-o", tmp_path / "m", "--device", "cpu"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "case0_image.nii.gz: can't be read" in run.stderr
        done = sorted(path.name for path in (tmp_path / "m").iterdir())
        assert done == [f"case{n}_mask.nii.gz" for n in (1, 2)]

    def test_a_bug_stops_one_case(self, folder, tmp_path, model, monkeypatch):
        original = sys_modules_predict.load_placed

        def broken(case, *args):
            if case.name == "case1":
                raise IndexError("list index out of range")
            return original(case, *args)

        monkeypatch.setattr(sys_modules_predict, "load_placed", broken)
        result = CliRunner().invoke(
            app, ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "m")]
        )
        assert result.exit_code == 1
        assert "case1_image.nii.gz: failed (IndexError: list index" in result.stderr
        assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
            "case0_mask.nii.gz",
            "case2_mask.nii.gz",
        ]

    def test_no_room_for_a_window_skips_the_case(self, folder, tmp_path, model, monkeypatch):
        original = sys_modules_predict.network_predictor
        cases = []

        def predictor(*args):
            cases.append(1)
            if len(cases) == 2:
                return lambda windows, numbers: torch.empty(1 << 60)
            return original(*args)

        monkeypatch.setattr(sys_modules_predict, "network_predictor", predictor)
        report = engine.predict(folder, model, tmp_path / "m", config())
        assert names(report) == ["case0_mask.nii.gz", "case2_mask.nii.gz"]
        ((path, reason),) = report.failed
        assert path.name == "case1_image.nii.gz"
        assert "memory ran out (no room for one window of 16 x 16 x 8 voxels" in reason

    def test_a_full_disk_stops_the_run_and_leaves_nothing(
        self, folder, tmp_path, model, monkeypatch
    ):
        save, calls = nib.save, []

        def full(image, name):
            calls.append(name)
            if len(calls) == 2:
                Path(name).write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(image, name)

        monkeypatch.setattr(nib, "save", full)
        result = CliRunner().invoke(
            app, ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "m")]
        )
        assert result.exit_code == 1
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: {tmp_path / 'm' / 'case1_mask.nii.gz'}: No space left")
        assert [path.name for path in (tmp_path / "m").iterdir()] == ["case0_mask.nii.gz"]

    @pytest.mark.parametrize("command", ["predict", "residuals"])
    def test_scratch_volumes_that_do_not_fit_are_of_one_case(
        self, folder, tmp_path, model, monkeypatch, command
    ):
        """Only an output that can't be written stops the run; the output folder is not blamed."""
        write(folder / "case1_image.nii.gz", np.ones((60, 40, 30), np.float32))
        claim = os.posix_fallocate

        def full(descriptor, start, size):
            if size > 4 * 21 * 18 * 13:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            claim(descriptor, start, size)

        monkeypatch.setattr(os, "posix_fallocate", full)
        out = tmp_path / "m"
        if command == "predict":
            report = engine.predict(folder, model, out, config(accumulate="disk"))
        else:
            settings = residuals_config()
            settings.accumulate = "disk"
            paths = make_autoencoders(tmp_path)[:1]
            report = engine.cache_residuals(folder, paths, out, settings)
        assert [path.name[:5] for path in report.done] == ["case0", "case2"]
        ((path, reason),) = report.failed
        assert path.name == "case1_image.nii.gz" and reason.startswith(f"{path}: ")
        assert "accumulate" in reason and "memory_gb" in reason
        assert not list(out.glob("*case1*"))

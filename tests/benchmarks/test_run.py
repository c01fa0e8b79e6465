# SPDX-License-Identifier: Apache-2.0
"""The commands: a quick run end to end, what is left out, and the check for machines with a GPU."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import run
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import launches
from benchmarks.gpu.check import Step
from benchmarks.harness.rows import Absent, Row, Session


def test_a_quick_run_writes_results_and_a_report(tmp_path, monkeypatch):
    # pytest-benchmark measures nothing in a process that xdist started, nor in a child of it.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pick = "forward and size and (cpu or reference or cuda)"
    arguments = ["--quick", "--device=cpu", "--suites", "residual_map", "-k", pick]
    code = run.main([*arguments, "--out", str(tmp_path)])
    assert code == 0
    content = json.loads((tmp_path / "residual_map.json").read_text())
    rows = {row["peer"]: row for row in content["benchmarks"]}
    assert {"cpu", "reference"} <= rows.keys()
    fast = rows["cpu"]
    assert fast["error"] < 1e-5
    assert fast["peak_extra_bytes"] >= 4 * 96**3
    assert fast["share_of_floor"] == pytest.approx(fast["floor_seconds"] / fast["median"], 1e-2)
    assert fast["times_slower_than"].keys() == {"reference"}
    if not torch.cuda.is_available():
        (absent,) = (entry for entry in content["absent"] if entry["peer"] == "cuda")
        assert absent["reason"]
    assert "residual_map forward: 96³" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob(".*"))


def session(**limits):
    return Session("cpu", **({"seconds": 1.0, "longest_call": 10.0, "memory": 2**30} | limits))


def row(voxels, peer="matrix"):
    return Row("rcu", "global", "global", peer, False, voxels)


def test_what_would_not_fit_is_foretold_from_smaller_cases():
    rows = session()
    rows.saw(row(16**3), seconds=0.1, taken=2**26)
    rows.refuse(row(16**3), growth=2)
    rows.refuse(row(64**3, "cpu"), growth=2)  # of another peer nothing is known
    with pytest.raises(Absent, match="out of memory: a call would need about 4 GiB of 1 GiB"):
        rows.refuse(row(32**3), growth=2)
    rows.memory = 2**50
    with pytest.raises(Absent, match="too slow: a call would take about 7 minutes"):
        rows.refuse(row(64**3), growth=2)


def test_launches_names_what_it_ran(capsys):
    assert launches.main(["--device=cpu"]) == 0
    assert "residual_map on cpu" in capsys.readouterr().out


def test_the_plan_says_what_is_missing(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for step in (
        "build",
        "tests",
        "memcheck",
        "racecheck",
        "initcheck",
        "ncu",
        "kernels",
        "cuda_kernels",
        "benchmarks",
    ):
        assert f"\n{step}" in f"\n{printed}"
    assert "--no-build-isolation --no-deps" in printed and "--clock-control none" in printed
    if not torch.cuda.is_available():
        assert printed.count("not run: torch finds no CUDA device") == 5


def test_with_a_gpu_no_step_runs_in_tritons_interpreter(tmp_path, monkeypatch):
    """Whatever the shell has set; and the kernels are compiled for the device that is there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    steps = {step.name.split()[0]: step for step in gpu_check.plan(tmp_path, "")}
    assert all(step.environment["TRITON_INTERPRET"] == "0" for step in steps.values())
    assert steps["kernels"].command[-2:] == ["--architectures", "90"]
    assert not any("benchmarks.gpu.tune" in step.command for step in steps.values())
    without = gpu_check.plan(tmp_path, "there is none")
    assert not any("TRITON_INTERPRET" in step.environment for step in without)


def test_steps_that_fail_or_hang_are_told_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    python = gpu_check._PYTHON
    steps = [
        Step("fails", [python, "-c", "print('because'); raise SystemExit(3)"], 30),
        Step("hangs", [python, "-c", "import time; time.sleep(60)"], 1.0),
        Step("absent", ["nothing"], 1.0, "it is not installed"),
        Step("works", [python, "-c", "print('{left}')"], 30),
    ]
    monkeypatch.setattr(gpu_check, "plan", lambda out, gpu: steps)
    start = time.monotonic()
    assert gpu_check.main(["--out", str(tmp_path), "--budget", "40"]) == 1
    assert time.monotonic() - start < 30
    summary = (tmp_path / "summary.md").read_text()
    assert "- fails: FAILED with status 3" in summary and "because" in summary
    assert "- hangs: stopped after 1 s" in summary
    assert "- absent: not run: it is not installed" in summary
    assert "- works: ok" in summary
    assert 0 < int((tmp_path / "works.log").read_text()) <= 30


def test_no_step_begins_after_the_time_is_over(tmp_path):
    step = Step("late", ["nothing"], 30)
    assert gpu_check.run_step(step, tmp_path, time.monotonic() + 1)[0] == "not run: no time left"

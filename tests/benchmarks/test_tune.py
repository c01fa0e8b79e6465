# SPDX-License-Identifier: Apache-2.0
"""Tuning of the Triton kernels, as far as it needs no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.kernel_cases import calls
from grcsf_kernels.dispatch import OPERATORS
from grcsf_kernels.reference import gcu as reference_gcu
from grcsf_kernels.reference import residual_map as reference_residual_map
from grcsf_kernels.triton import launch


def row(block, **changes):
    usual = {"kernel": "forward", "architecture": 80, "dtype": "half", "shape": "any"}
    return usual | changes | {"parameters": {"BLOCK": block}, "source": "static"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BLOCK_C", 64, [32, 128]),
        ("BLOCK_C", 16, [32]),
        ("DRAWS", 1, [2]),
        ("num_warps", 4, [2, 8]),
        ("num_warps", 16, [8]),
        ("num_stages", 2, [1, 3, 4]),
        ("NODES", 64, []),
        ("BLOCK_C", 48, []),
    ],
)
def test_alternatives(name, value, expected):
    assert tune.alternatives(name, value) == expected


def test_the_search_keeps_the_best_of_one_parameter_for_the_next():
    seen = []

    def cost(parameters):
        seen.append(parameters)
        if parameters["num_warps"] == 2:
            return float("inf")
        return 100 / parameters["BLOCK"] + parameters["num_warps"]

    best, least, first = tune.search({"BLOCK": 32, "num_warps": 8}, cost)
    assert best == {"BLOCK": 64, "num_warps": 4}
    assert least == cost(best) and first == cost({"BLOCK": 32, "num_warps": 8})
    assert {"BLOCK": 64, "num_warps": 16} in seen and {"BLOCK": 32, "num_warps": 4} not in seen


def test_noise_changes_nothing():
    costs = iter([1.0] + [0.98] * 20)
    start = {"BLOCK": 32, "num_warps": 8}
    assert tune.search(start, lambda parameters: next(costs))[0] == start


def test_a_row_takes_the_place_of_its_own():
    rows = [row(1), row(2, shape="wide"), row(3, dtype="float32")]
    assert tune.merged(rows, row(9, shape="wide")) == [rows[0], row(9, shape="wide"), rows[2]]
    assert tune.merged(rows, row(9, architecture=90)) == [*rows, row(9, architecture=90)]


def test_tables_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "gcu.json"
    tune.write_table(path, [row(1), row(2, shape="wide")])
    assert json.loads(path.read_text())["rows"] == [row(1), row(2, shape="wide")]
    assert len(path.read_text().splitlines()) == 4

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tune.write_table(path, [])
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_tables_of_the_package_are_written_as_they_are(tmp_path):
    """So that tuning one row changes one line."""
    for path in launch.table_path("gcu").parent.glob("*.json"):
        tune.write_table(tmp_path / path.name, launch.table(path))
        assert (tmp_path / path.name).read_text() == path.read_text(), path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_dry_run_lists_every_row_that_is_in_use(operator, capsys):
    pytest.importorskip("triton")
    assert tune.main(["--dry-run", "--operators", operator, "--architecture", "90"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [
        f"{name} {r['kernel']} {r['dtype']} {r['shape']} ("
        for name in tune.tables_of(operator)
        for r in tune.selectable(launch.table(launch.table_path(name)), 90)
        if r["dtype"] != "float64"
    ]
    assert len(printed) == len(rows)
    for start in rows:
        assert any(line.startswith(start) and "num_warps" in line for line in printed), start


@pytest.mark.parametrize("module", [reference_residual_map, reference_gcu])
def test_calls_run_on_real_tensors_too(module):
    """What is checked and timed on a GPU: the same arguments, here on the reference."""
    operator = module.__name__.rsplit(".", 1)[1]
    call = next(c for c in calls(operator, ("float32",)) if c.case.family in ("2D", "odd sizes"))
    found = call.run(module, call.tensors("cpu"))
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert found[0].shape[2:] == call.case.space

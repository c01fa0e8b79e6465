# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel is compiled ahead of time, for every architecture, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.ahead_of_time import limits, occupancy
from benchmarks.gpu.kernels import selectable
from grcsf_kernels.dispatch import OPERATORS
from grcsf_kernels.triton import launch

pytest.importorskip("triton")

_ROOT = Path(__file__).parents[2]


# Each operator in one process: compiling it takes minutes, and both cores.
@pytest.fixture(
    scope="module",
    params=[pytest.param(o, marks=pytest.mark.xdist_group(f"compiled_{o}")) for o in OPERATORS],
)
def compiled(request, tmp_path_factory):
    """What ``python -m benchmarks.gpu.kernels --quick`` says of an operator."""
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--quick", "--json", str(out)]
    result = subprocess.run(
        [*command, "--operators", request.param],
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(out.read_text()) | {"operator": request.param, "status": result.returncode}


def test_kernels_compile_without_spills_and_fit(compiled):
    """And every row of the tables is chosen by some call."""
    assert compiled["wrong"] == [] and compiled["status"] == 0
    kernels = compiled["kernels"]
    assert {k["architecture"] for k in kernels} == set(launch.ARCHITECTURES)
    for kernel in kernels:
        assert kernel["kernel"].startswith(f"grcsf_{compiled['operator']}_")
        assert kernel["error"] == "" and kernel["registers"] > 0
        if not kernel["float64"]:
            assert kernel["stack"] == 0, kernel
            assert kernel["shared"] <= limits(kernel["architecture"]).shared_of_block, kernel
            assert kernel["occupancy"] > 0, kernel


def test_every_architecture_gets_the_same_kernels(compiled):
    found = {
        (kernel["kernel"], architecture)
        for kernel in compiled["kernels"]
        for architecture in [kernel["architecture"]]
    }
    counts = Counter(name for name, _ in found)
    assert set(counts.values()) == {len(launch.ARCHITECTURES)}, counts


def test_the_page_names_every_kernel(compiled):
    page = (_ROOT / "docs/kernels.md").read_text()
    missing = {k["kernel"] for k in compiled["kernels"] if f"`{k['kernel']}`" not in page}
    assert not missing, "run python -m benchmarks.gpu.kernels --write docs/kernels.md"


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "held"),
    [
        (90, 32, 0, 8, 64),
        (90, 33, 0, 8, 48),  # 40 registers: 6 blocks of 8 warps
        (90, 64, 0, 16, 32),
        (90, 65, 0, 16, 16),
        (80, 128, 0, 4, 16),
        (80, 255, 0, 8, 8),
        (80, 32, 80 * 1024, 4, 8),
        (80, 32, 82 * 1024, 4, 4),
        (90, 32, 227 * 1024, 8, 8),
        (80, 32, 164 * 1024, 8, 0),
        (86, 32, 0, 16, 48),
        (80, 16, 0, 1, 32),  # 32 blocks at most
    ],
)
def test_occupancy(architecture, registers, shared, warps, held):
    assert occupancy(architecture, registers, shared, warps) == held


def test_newer_rows_hide_older_ones():
    def row(architecture, shape="any"):
        usual = {"kernel": "forward", "dtype": "half", "parameters": {}}
        return usual | {"architecture": architecture, "shape": shape}

    rows = [row(90), row(80), row(0), row(80, "narrow"), row(100)]
    found = {
        architecture: [(r["architecture"], r["shape"]) for r in selectable(rows, architecture)]
        for architecture in (80, 90, 100)
    }
    assert found[80] == [(80, "any"), (80, "narrow")]
    assert found[90] == [(90, "any"), (80, "narrow")]
    assert found[100] == [(100, "any"), (80, "narrow")]

# SPDX-License-Identifier: Apache-2.0
"""Building where nothing can be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"GRCSF_BUILD_CUDA": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def info(folder: Path) -> dict[str, str]:
    return json.loads((folder / "lib/grcsf_kernels/_build_info.json").read_text())


def test_without_a_compiler_it_installs_as_pure_python(tmp_path):
    result = build(tmp_path, CXX="/nowhere/g++")
    assert result.returncode == 0, result.stdout
    assert not list((tmp_path / "lib").rglob("_C*"))
    reason = info(tmp_path)["native"]
    assert reason.startswith("the native build failed") and "compiler" in reason


def test_without_a_compiler_it_fails_where_native_kernels_are_demanded(tmp_path):
    result = build(tmp_path, CXX="/nowhere/g++", GRCSF_BUILD_CPU="1")
    assert result.returncode != 0 and "building grcsf_kernels._C failed" in result.stdout


def test_switched_off(tmp_path):
    result = build(tmp_path, GRCSF_BUILD_CPU="0")
    assert result.returncode == 0, result.stdout
    assert "GRCSF_BUILD_CPU=0" in info(tmp_path)["native"]


@pytest.mark.parametrize("name", ["GRCSF_BUILD_CPU", "GRCSF_BUILD_CUDA"])
def test_a_wrong_switch_is_named(tmp_path, name):
    result = build(tmp_path, **{"CXX": "/nowhere/g++", name: "yes"})
    assert result.returncode != 0
    assert f"{name} is 'yes', expected auto, 1 or 0" in result.stdout


def test_builds_without_torch(tmp_path):
    """The whole native build with every import of torch refused."""
    (tmp_path / "site/torch").mkdir(parents=True)
    refuse = "raise ImportError('the build imported torch')"
    (tmp_path / "site/torch/__init__.py").write_text(refuse)
    result = build(tmp_path, PYTHONPATH=str(tmp_path / "site"), GRCSF_BUILD_CPU="1")
    assert result.returncode == 0, result.stdout
    (built,) = (tmp_path / "lib/grcsf_kernels").glob("_C*.so")
    assert info(tmp_path)["native"] == "" and built.stat().st_size > 10_000
    assert "switched off by GRCSF_BUILD_CUDA=0" in info(tmp_path)["cuda"]

# SPDX-License-Identifier: Apache-2.0
"""``grcsf doctor`` in environments where parts are missing, damaged or too old."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from grcsf_kernels import doctor, native


@pytest.fixture
def without_memory():
    """The native module is looked for again, before and after."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_it_names_the_instruction_set_and_where_operators_run():
    report = doctor.report()
    if not native.why_not("cpu"):
        assert f"instruction set {native.library().isa()}" in report
    for operator in ("residual_map", "gcu", "rcu"):
        assert f"  cpu        {operator}" in report


@pytest.mark.parametrize(
    "error", [ImportError("_C.so: file too short"), ImportError("undefined symbol: x")]
)
def test_a_damaged_module_is_named_with_the_remedy(error, monkeypatch, without_memory):
    real = importlib.import_module

    def load(name):
        if name == "grcsf_kernels._C":
            raise error
        return real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    report = doctor.report()
    assert str(error) in report and "remedy: with a C++ compiler" in report
    # Where it is said which backend runs, the reason is beside it.
    (line,) = (line for line in report.splitlines() if line.startswith("  cpu        gcu"))
    assert "reference" in line and "cpu: " in line


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    """A build of another version, or a torch that is half installed."""

    def fail(*arguments):
        raise AttributeError("module 'x' has no\nattribute 'y'")

    monkeypatch.setattr(doctor.native, "why_not", fail)
    monkeypatch.setattr(torch.cuda, "device_count", fail)
    report = doctor.report()
    assert "torch      can't be looked at: AttributeError: module 'x' has no attribute" in report
    assert "_C         can't be looked at: AttributeError" in report
    assert "  cpu        not available: AttributeError" in report
    assert "  reference  residual_map, gcu, rcu" in report and "Extras" in report


def test_a_torch_that_is_too_old_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert "too old: pip install 'torch>=2.6'" in doctor.report()


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("monai", "typer"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert 'missing monai, typer: pip install "grcsf-kernels[train]"' in doctor.report()


def test_variables_that_change_what_runs_are_shown(monkeypatch):
    monkeypatch.setenv("GRCSF_CPU_ISA", "portable\n")
    assert "  GRCSF_CPU_ISA='portable\\n'" in doctor.report()

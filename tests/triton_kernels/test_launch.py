# SPDX-License-Identifier: Apache-2.0
"""Which parameters a Triton kernel starts with, and launches that are recorded instead of run."""

from __future__ import annotations

import json

import pytest
import torch
from support import DTYPES

from grcsf_kernels.triton import launch

pytest.importorskip("triton")


def row(block, **changes):
    usual = {"kernel": "forward", "architecture": 80, "dtype": "float32", "shape": "any"}
    return usual | changes | {"parameters": {"BLOCK": block}, "source": "static"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that makes the table in use: ``gcu.json`` of these rows."""
    monkeypatch.setenv("GRCSF_TRITON_PARAMETERS", str(tmp_path))
    monkeypatch.setattr(launch, "table", launch.table.__wrapped__)
    monkeypatch.setattr(launch, "_row", launch._row.__wrapped__)
    return lambda *rows: (tmp_path / "gcu.json").write_text(json.dumps({"rows": rows}))


def block_for(architecture, dtype=torch.float32, shape="any"):
    """What the table gives for a tensor on a device of this architecture."""
    with launch.recording(architecture):
        tensor = torch.empty(1, dtype=dtype, device="meta")
        return launch.parameters("gcu", "forward", tensor, shape)["BLOCK"]


def test_the_newest_row_that_is_not_newer_than_the_device(write):
    write(row(1), row(3, architecture=100), row(2, architecture=90))
    found = {arch: block_for(arch) for arch in (70, 75, 80, 86, 89, 90, 100, 120)}
    assert found == {70: 1, 75: 1, 80: 1, 86: 1, 89: 1, 90: 2, 100: 3, 120: 3}


def test_the_own_shape_comes_before_any_shape_and_that_before_the_architecture(write):
    write(row(1), row(2, architecture=90), row(3, shape="wide"), row(4, shape="narrow"))
    assert [block_for(90, shape=shape) for shape in ("any", "wide", "narrow", "odd")] == [
        2,
        3,
        4,
        2,
    ]


def test_half_precision_types_share_their_rows(write):
    write(row(1), row(2, dtype="half"), row(3, dtype="float64"))
    found = {dtype: block_for(80, dtype) for dtype in DTYPES}
    assert found == {
        torch.float32: 1,
        torch.float16: 2,
        torch.bfloat16: 2,
        torch.float64: 3,
    }


def test_a_row_that_is_missing_is_named(write):
    write(row(1, shape="wide"))
    with pytest.raises(
        LookupError, match=r"gcu\.json has no row for forward, float32, .*odd, sm_90"
    ):
        block_for(90, shape="odd")


def test_callers_may_change_what_they_get(write):
    write(row(1))
    with launch.recording(80):
        tensor = torch.empty(1, device="meta")
        launch.parameters("gcu", "forward", tensor).clear()
        assert launch.parameters("gcu", "forward", tensor) == {"BLOCK": 1}


def test_tables_of_the_package_are_for_every_dtype():
    """Their rows are complete, and say where they come from."""
    paths = sorted(launch.table_path("gcu").parent.glob("*.json"))
    assert {path.stem for path in paths} >= {"residual_map", "gcu", "rcu"}
    for path in paths:
        rows = launch.table(path)
        assert {r["dtype"] for r in rows} == {"half", "float32", "float64"}, path
        keys = [(r["kernel"], r["architecture"], r["dtype"], r["shape"]) for r in rows]
        assert len(set(keys)) == len(keys), path
        for r in rows:
            assert set(r) == {"kernel", "architecture", "dtype", "shape", "parameters", "source"}
            assert r["architecture"] in (launch.INTERPRETER, *launch.ARCHITECTURES) and r["source"]
            assert r["parameters"]["num_warps"] in (1, 2, 4, 8, 16, 32), r


def test_recording_on_meta_tensors_launches_nothing():
    from grcsf_kernels.triton.residual_map import kernels as residual_map

    image = torch.empty(2, 1, 32, 32, 32, device="meta")
    prediction = torch.empty(3, 2, 8, 4096, dtype=torch.bfloat16, device="meta")
    options = ([16] * 3, True, "residuals", 1e-6)
    with launch.recording(90) as recorded:
        residual = residual_map.forward(image, prediction, None, *options)
        residual_map.backward(residual, image, prediction, None, *options, (True, False))
    assert residual.is_meta and residual.shape == image.shape
    forward, backward = recorded
    assert forward.kernel is residual_map.grcsf_residual_map_forward
    assert forward.arguments["hidden"] is None and forward.arguments["draws"] == 3
    assert forward.constants["PATCH_D"] == 16 and not forward.constants["WIDE"]
    assert set(forward.options) == {"num_warps", "num_stages"}
    assert backward.arguments["grad_prediction"] is None
    assert [(name, r["kernel"]) for name, r in recorded.rows] == [
        ("residual_map", "forward"),
        ("residual_map", "backward"),
    ]


def test_recordings_nest_and_end():
    with launch.recording(80) as outer:
        tensor = torch.empty(1, device="meta")
        with launch.recording(100) as inner:
            assert launch.architecture(tensor) == 100
        assert launch.architecture(tensor) == 80
    assert outer == inner == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU")
def test_the_interpreter_has_rows_of_its_own(write):
    write(row(1), row(2, architecture=0), row(3, shape="wide"), row(4, dtype="half"))
    tensor = torch.empty(1)
    assert launch.architecture(tensor) == launch.INTERPRETER
    assert launch.parameters("gcu", "forward", tensor) == {"BLOCK": 2}
    assert launch.parameters("gcu", "forward", tensor.half()) == {"BLOCK": 4}
    assert block_for(80) == 1


def test_nothing_is_started_for_no_programs():
    with launch.recording(80) as recorded:
        launch.launch(None, 0)
    assert recorded == []


def test_precision_of_products():
    found = {}
    for architecture in (70, 75, 80, 90):
        with launch.recording(architecture):
            found[architecture] = [
                launch.precision(torch.empty(0, dtype=dtype, device="meta")) for dtype in DTYPES
            ]
    assert found[80] == found[90] == ["float64", "tf32x3", "tf32", "tf32"]
    assert found[70] == found[75] == ["float64", "ieee", "ieee", "ieee"]


def test_wide_from_2_to_the_31_elements_on():
    def meta(*shape):
        return torch.empty(shape, dtype=torch.float16, device="meta")

    small, edge, large = meta(8), meta(2**16, 2**15 - 1), meta(2**16, 2**15)
    assert not launch.wide() and not launch.wide(None, small, edge)
    assert launch.wide(large) and launch.wide(None, small, large)


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)]
)
def test_powers_of_two(size, expected):
    assert launch.power_of_2(size) == expected
    assert launch.power_of_2(size, 16) == max(expected, 16)
    assert launch.blocks(size, 64) == (size + 63) // 64


def test_why_triton_kernels_can_not_run(monkeypatch):
    from importlib import metadata

    from grcsf_kernels import triton as backend

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda name: "3.3.1")
    assert "3.3.1 is installed, and the kernels need 3.4" in backend.why_not("triton")
    monkeypatch.setattr(metadata, "version", version)
    assert "3.3.1" not in backend.why_not("triton")  # a build of unknown name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed: pip install" in backend.why_not("triton")

# SPDX-License-Identifier: Apache-2.0
"""The vectors' own exponential (``csrc/cpu/simd/simd.h``), for every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import ISAS, run_native

# By dtype: the relative error that simd.h promises, the range, and where 0 begins.
PROMISES = {"float32": (1.5e-7, -80.0, 5.0, 80.0), "float64": (4e-16, -700.0, 80.0, 700.0)}


def exponentials(isa: str, values: np.ndarray, folder: Path) -> np.ndarray:
    """``_C.exponential`` of ``values`` in a process that runs on ``isa``."""
    source, target = folder / "values.npy", folder / "found.npy"
    np.save(source, values)
    result = run_native(
        "import numpy\n"
        "isa, source, target = sys.argv[1:]\n"
        "assert isa in ('', _C.isa())\n"
        "values = numpy.load(source)\n"
        "found = numpy.full_like(values, numpy.nan)\n"
        "_C.exponential(values.__dlpack__(), found.__dlpack__())\n"
        "numpy.save(target, found)\n",
        *(isa, str(source), str(target)),
        isa=isa,
    )
    assert result.returncode == 0, result.stderr
    return np.load(target)


def relative_errors(found: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Against a wider exponential of the same rounded values."""
    exact = np.exp(values.astype(np.longdouble))
    return np.abs((found.astype(np.longdouble) - exact) / exact).astype(np.float64)


@pytest.mark.parametrize("dtype", PROMISES)
@pytest.mark.parametrize("isa", ISAS)
def test_relative_error_is_within_the_promise(isa, dtype, tmp_path):
    """Dense over the whole range, around every multiple of ln 2 / 2, and around 0."""
    bound, least, most, _ = PROMISES[dtype]
    random = np.random.default_rng(0)
    halves = np.arange(np.ceil(2 * least), 2 * most) * (np.log(2) / 2)
    values = np.concatenate(
        [
            np.linspace(least, most, 400_001),
            random.uniform(least, most, 100_000),
            (halves[:, None] + np.linspace(-1e-6, 1e-6, 41)).ravel(),
            np.geomspace(1e-30, 1, 1000),
            -np.geomspace(1e-30, 1, 1000),
        ]
    )
    values = np.clip(values, least, most).astype(dtype)
    found = exponentials(isa, values, tmp_path)
    assert found.dtype == values.dtype
    errors = relative_errors(found, values)
    worst = errors.argmax()
    assert errors[worst] <= bound, f"exp({values[worst]!r}) is off by {errors[worst]:.2e}"


@pytest.mark.parametrize("dtype", PROMISES)
@pytest.mark.parametrize("isa", ISAS)
def test_edges_of_the_range(isa, dtype, tmp_path):
    """1 at 0, precise up to the last values, 0 below them and at -infinity; NaN stays."""
    bound, least, _, most = PROMISES[dtype]
    lowest = np.array(least, dtype)
    below = np.nextafter(lowest, np.array(-np.inf, dtype))
    inside = np.array([least, np.nextafter(lowest, np.array(0, dtype)), most], dtype)
    # Not a whole vector of any instruction set.
    beyond = np.array([below, 2 * least, np.finfo(dtype).min, -np.inf, np.nan, 0.0, -0.0], dtype)
    found = exponentials(isa, np.concatenate([inside, beyond]), tmp_path)
    assert relative_errors(found[:3], inside).max() <= bound
    assert (found[3:7] == 0).all() and not np.signbit(found[3:7]).any()
    assert np.isnan(found[7])
    assert (found[8:] == 1).all()

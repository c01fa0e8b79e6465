# SPDX-License-Identifier: Apache-2.0
"""What is required to be finite: gradients, weights, and what is read from model files."""

from __future__ import annotations

import math

import pytest
import torch

from grcsf_kernels.common.finite import is_finite, require_finite, tensors_of
from grcsf_kernels.engine import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(bad, dtype):
    for place in (0, 3, 6):
        values = torch.arange(7).to(dtype)
        assert is_finite(values) and is_finite(values[::2])
        values[place] = bad
        assert not is_finite(values)
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))


def test_what_has_no_fraction_or_no_value_is_finite():
    assert is_finite(torch.empty(0)) and is_finite(torch.ones(3, dtype=torch.bool))
    assert is_finite(torch.tensor(2**62)) and not is_finite(torch.tensor(complex(0, math.nan)))


def test_the_tensor_is_named():
    state = {"model": {"a": torch.ones(2)}, "more": [1, {"b": torch.tensor([1.0, math.nan])}]}
    require_finite("x", tensors_of(state["model"]), "weights", "train again")
    with pytest.raises(InputError, match=r"x: has weights that are NaN or infinite \(more.1.b\)"):
        require_finite("x", tensors_of(state), "weights", "train again")

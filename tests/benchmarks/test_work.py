# SPDX-License-Identifier: Apache-2.0
"""The floors, counted by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import measure, work
from benchmarks.harness.cases import Case, all_cases, make_inputs


def test_gcu_reads_each_input_and_writes_each_output_once():
    skip, deep = torch.zeros(1, 4, 8, 8, 8), torch.zeros(1, 4, 4, 4, 4)
    gates = [torch.zeros(1, 4), torch.zeros(1, 4)]
    value, voxels, deep_voxels = 4, 512, 64
    read = value * (4 * voxels + 4 * deep_voxels + 8)
    forward = read + value * 5 * voxels
    assert work.gcu(skip, deep, *gates, backward=False).bytes == forward
    # Backward reads the inputs and two gradients, and writes as much as the inputs take.
    both = forward + 2 * read + value * 5 * voxels
    assert work.gcu(skip, deep, *gates, backward=True).bytes == both


def test_rcu_in_half_precision_counts_two_bytes_for_data_and_four_for_weights():
    case = Case("rcu", "size", (16, 16, 16), 8, "bfloat16")
    inputs = make_inputs(case, "cpu", 0)
    x, residual, *weights = inputs.arguments
    small = sum(weight.numel() for weight in weights) * 4
    expected = 2 * (2 * x.numel() + residual.numel()) + small
    floor = work.rcu(*inputs.arguments, backward=False, **inputs.options)
    assert floor.bytes == expected
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_residual_map_reads_only_the_draws_that_count():
    image, prediction = torch.zeros(1, 1, 32, 32), torch.zeros(4, 1, 4, 256)
    hidden = torch.zeros(4, 1, 4, dtype=torch.bool)
    none = work.residual_map(image, prediction, hidden, backward=False)
    assert none.bytes == 2 * image.nbytes + hidden.nbytes
    every = work.residual_map(image, prediction, ~hidden, backward=False)
    assert every.bytes == none.bytes + prediction.nbytes


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_of_a_power_law_is_found(power):
    points = [(float(size**3), 3e-9 * float(size**3) ** power) for size in (16, 32, 64)]
    assert work.exponent(points) == pytest.approx(power)


def test_one_size_has_no_exponent():
    assert work.exponent([(8.0, 1.0), (8.0, 2.0)]) is None


def test_inputs_take_turns_until_the_cache_is_passed_twice():
    cache = measure.cache_bytes("cpu")
    assert measure.rotations(4 * cache, "cpu") == 1
    assert measure.rotations(cache, "cpu") == 3
    assert measure.rotations(1, "cpu") == 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", ["residual_map", "gcu", "rcu"])
def test_cases_cover_what_is_promised(operator, device):
    cases = all_cases(operator, device)
    assert len({case.title for case in cases}) == len(cases)
    assert {case.space[0] for case in cases if case.family == "size"} == {64, 96, 128, 192}
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
    assert {"layout", "image"} <= {case.family for case in cases}
    if operator != "residual_map":
        assert {case.channels for case in cases} == {16, 32, 64, 128, 256}
        assert sum(case.family == "level" for case in cases) >= 4
    assert any(case.quick for case in cases)

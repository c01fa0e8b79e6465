# SPDX-License-Identifier: Apache-2.0
"""Peak memory: a known pattern is measured right, by both ways."""

from __future__ import annotations

import pytest
import torch
from support import DEVICES, example

from benchmarks.harness.memory import measure_peak

MB = 10**6


def known_pattern(device: str) -> None:
    """Peaks at 150 MB while two tensors live; 130 MB live at its end."""
    first = torch.ones(50 * MB // 4, device=device)
    second = torch.ones(100 * MB // 4, device=device)
    del first
    third = torch.ones(30 * MB // 4, device=device)
    del second, third


@pytest.mark.parametrize("device", DEVICES)
def test_a_known_pattern_is_measured_within_two_percent(device):
    known_pattern(device)
    peak = measure_peak(lambda: known_pattern(device), device)
    assert peak.allocated == pytest.approx(150 * MB, rel=0.02)
    if peak.resident is not None:
        assert peak.resident == pytest.approx(150 * MB, rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_what_lived_before_is_not_counted(device):
    before = torch.ones(80 * MB // 4, device=device)
    peak = measure_peak(lambda: before.mul_(2), device)
    assert peak.allocated < MB


def test_the_record_of_operations_is_switched_on_again():
    """Measuring memory switches it off; a profile taken afterwards must still see operations."""
    measure_peak(lambda: torch.ones(10), "cpu")
    with torch.autograd.profiler.profile() as record:
        torch.ones(10).add_(1)
    assert any("add_" in event.name for event in record.function_events)


def test_allocator_and_resident_set_agree_on_an_operator():
    """Native code takes its memory elsewhere; that it is little shows in the resident set."""
    call = example("residual_map", space=(128, 128, 64))
    call()
    peak = measure_peak(call, "cpu")
    outputs = sum(tensor.nbytes for tensor in call())
    assert peak.allocated >= outputs
    if peak.resident is not None:
        assert peak.resident < 1.5 * peak.allocated + 2 * MB

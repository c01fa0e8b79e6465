# SPDX-License-Identifier: Apache-2.0
"""The measures on masks whose values can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grcsf_kernels.engine.evaluation.metrics import measure


def mask(*boxes, shape=(12, 10, 8)):
    array = np.zeros(shape, dtype=bool)
    for box in boxes:
        array[tuple(slice(*axis) for axis in box)] = True
    return array


ONE = ((1, 3), (1, 3), (1, 3))  # 8 voxels
HALF = ((1, 3), (1, 3), (1, 2))  # 4 of them
FAR = ((8, 10), (6, 8), (5, 7))
TOUCHING = ((3, 5), (3, 5), (3, 5))  # shares a corner with ONE


def test_equal_masks():
    found = measure(mask(ONE, FAR), mask(ONE, FAR), (1, 1, 1))
    assert found["dice"] == found["lesion_f1"] == found["sensitivity"] == found["precision"] == 1
    assert found["hd95"] == 0 and found["volume_difference"] == 0
    assert found["lesions_found"] == 2


def test_half_of_one_lesion_and_another_missed():
    found = measure(mask(HALF), mask(ONE, FAR), (1, 2, 3))
    assert found["dice"] == pytest.approx(2 * 4 / (4 + 16))
    assert found["sensitivity"] == 4 / 16 and found["precision"] == 1
    assert (found["lesions_found"], found["lesions_missed"], found["lesions_false"]) == (1, 1, 0)
    assert found["lesion_f1"] == pytest.approx(2 / 3)
    assert found["volume_difference"] == (4 - 16) * 6


def test_false_lesion():
    found = measure(mask(ONE, FAR), mask(ONE), (1, 1, 1))
    assert (found["lesions_found"], found["lesions_missed"], found["lesions_false"]) == (1, 0, 1)
    assert found["precision"] == 0.5 and found["sensitivity"] == 1


def test_corners_connect():
    found = measure(mask(ONE, TOUCHING), mask(ONE, TOUCHING), (1, 1, 1))
    assert found["lesions_found"] == 1


def test_one_prediction_over_two_lesions_finds_both():
    both = mask(ONE, FAR)
    found = measure(np.ones_like(both), both, (1, 1, 1))
    assert (found["lesions_found"], found["lesions_missed"], found["lesions_false"]) == (2, 0, 0)
    assert found["lesion_f1"] == 1


def test_distance_is_in_millimeters():
    moved = ((1, 3), (1, 3), (3, 5))
    for spacing, expected in (((1, 1, 1), 2), ((1, 1, 6.5), 13)):
        assert measure(mask(ONE), mask(moved), spacing)["hd95"] == pytest.approx(expected, rel=0.2)


def test_empty_masks():
    nothing = mask()
    both = measure(nothing, nothing, (1, 1, 1))
    assert both["dice"] == both["lesion_f1"] == both["sensitivity"] == both["precision"] == 1
    assert math.isnan(both["hd95"])
    missed = measure(nothing, mask(ONE), (1, 1, 1))
    assert missed["dice"] == missed["lesion_f1"] == missed["sensitivity"] == 0
    assert missed["precision"] == 0 and math.isnan(missed["hd95"])
    false = measure(mask(ONE), nothing, (1, 1, 1))
    assert false["dice"] == false["precision"] == false["sensitivity"] == 0

# SPDX-License-Identifier: Apache-2.0
"""The first cases of ``make fuzz`` for the readers; it runs as many as there is time for."""

from __future__ import annotations

import pytest
from fuzz import readers


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_damaged_files_and_folders_are_read_right_or_refused(first):
    kinds = {readers.check(case) for case in range(first, first + 50)}
    assert {kind.split()[-1] for kind in kinds} >= {"read", "refused", "found"}

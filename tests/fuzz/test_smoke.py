# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of the operators itself: some cases, always the same ones; ``make fuzz`` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ISAS


@pytest.mark.skipif(not ISAS, reason="the CPU kernels were not built")
def test_fuzzed_calls_are_right_or_refused():
    from fuzz import operators

    kinds = {operators.check(case).split()[0] for case in range(25)}
    assert {"gcu", "rcu", "residual_map", "refusal"} <= kinds


def test_a_wrong_case_needs_its_area():
    command = [sys.executable, str(Path(__file__).parent), "--case", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "--case needs --only" in result.stderr

# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import interpreter
import torch
from hypothesis import settings

# The benchmarks are a package of the checkout. Last, so that an installed package comes before it.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# Without a GPU Triton's interpreter runs the Triton kernels. Read when Triton is imported, so it is
# set before anything else is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.be_quick()

# What guards main tries the same examples every time; a developer's runs try new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_report_header() -> str:
    """Which instruction sets the tests of the CPU kernels run on."""
    from support import ISAS

    from grcsf_kernels import native

    if not ISAS:
        return "CPU kernels: not built"
    return f"CPU kernels: on {native.library().isa()}; tests of instruction sets: {', '.join(ISAS)}"

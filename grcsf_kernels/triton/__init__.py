# SPDX-License-Identifier: Apache-2.0
"""The room of the Triton kernels, one file an operator.

Nothing here imports Triton until a kernel runs, so that ``import grcsf_kernels`` works on machines
without a GPU, without a driver and without Triton.
"""

from __future__ import annotations

import importlib.util

import torch


def why_not(backend: str) -> str:
    """The reason why Triton kernels can't run here, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed: pip install "grcsf-kernels[triton]"'
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return ""


def device_types(backend: str) -> tuple[str, ...]:
    """The device types whose tensors the kernels take."""
    return ("cuda",)


def operators(backend: str) -> tuple[str, ...]:
    """The operators that have a Triton kernel."""
    return ()

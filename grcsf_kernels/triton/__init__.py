# SPDX-License-Identifier: Apache-2.0
"""Triton backend: one subpackage per operator.

Nothing here imports Triton until a kernel runs, so that ``import grcsf_kernels`` works on machines
without a GPU, without a driver and without Triton. Where ``TRITON_INTERPRET=1`` was set before
Triton was imported, its interpreter runs the kernels, on CPU tensors too: slowly, and without a
GPU. Dispatch never chooses that by itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from grcsf_kernels.common.backends import OPERATORS

_OLDEST = (3, 4)
# What Triton is called where PyTorch builds it itself.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm")


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _version() -> str:
    """Triton's version, or an empty string where its distribution has an unknown name."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def why_not(backend: str) -> str:
    """The reason why Triton kernels can't run here, or an empty string."""
    found = importlib.util.find_spec("triton")
    version = _version()
    # Without an origin it is a folder that happens to have this name.
    if found is None or (found.origin is None and not version):
        return 'Triton is not installed: pip install "grcsf-kernels[triton]"'
    if version and tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton {version} is installed, and the kernels need {_OLDEST[0]}.{_OLDEST[1]}"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch sees no CUDA device"
    return ""


def device_types(backend: str) -> tuple[str, ...]:
    """The device types whose tensors the kernels take."""
    return ("cuda", "cpu") if interpreting() else ("cuda",)


def operators(backend: str) -> tuple[str, ...]:
    """The operators that have a Triton kernel."""
    return OPERATORS

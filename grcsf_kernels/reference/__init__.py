# SPDX-License-Identifier: Apache-2.0
"""The readable definition of every operator in eager PyTorch: any device, any floating dtype.

Each file has ``forward`` and ``backward`` of one operator. They take arguments that the operator's
file in ``grcsf_kernels.ops`` has checked, in the layouts that it has made dense, compute in float32
(float64 for float64 data), and are what every other backend is tested against.
"""

from __future__ import annotations

from grcsf_kernels.common.backends import OPERATORS


def why_not(backend: str) -> str:
    """Nothing keeps the reference from running."""
    return ""


def device_types(backend: str) -> None:
    """Any device."""
    return None


def operators(backend: str) -> tuple[str, ...]:
    """All operators."""
    return OPERATORS

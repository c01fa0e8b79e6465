# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for GRCSF lesion segmentation in 3D medical images.

Three operators (:func:`residual_map`, :func:`gcu`, :func:`rcu`), drop-in modules around them
(:mod:`grcsf_kernels.nn`), the networks (:mod:`grcsf_kernels.models`) and a thin engine that trains
and runs them (:mod:`grcsf_kernels.engine`, with the ``train`` extra).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grcsf_kernels._version import __version__
from grcsf_kernels.dispatch import BackendStatus, backends, use_backend
from grcsf_kernels.ops import gcu, rcu, residual_map

if TYPE_CHECKING:
    from grcsf_kernels import models, nn

__all__ = [
    "BackendStatus",
    "__version__",
    "backends",
    "gcu",
    "models",
    "nn",
    "rcu",
    "residual_map",
    "use_backend",
]


def __getattr__(name: str) -> object:
    # Loaded on first use: someone who only calls the operators does not pay for the networks.
    if name in ("nn", "models"):
        import importlib

        return importlib.import_module(f"grcsf_kernels.{name}")
    raise AttributeError(f"module 'grcsf_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for GRCSF lesion segmentation in 3D medical images.

Three operators (:func:`residual_map`, :func:`gcu`, :func:`rcu`), drop-in modules around them
(:mod:`grcsf_kernels.nn`), the networks (:mod:`grcsf_kernels.models`) and an engine that trains and
runs them (:mod:`grcsf_kernels.engine`, with the ``train`` extra).
"""

from __future__ import annotations

from grcsf_kernels import functional, models, nn
from grcsf_kernels._version import __version__
from grcsf_kernels.dispatch import BackendStatus, backends, use_backend
from grcsf_kernels.ops import RCUWeights, gcu, rcu, residual_map

__all__ = [
    "BackendStatus",
    "RCUWeights",
    "__version__",
    "backends",
    "functional",
    "gcu",
    "models",
    "nn",
    "rcu",
    "residual_map",
    "use_backend",
]

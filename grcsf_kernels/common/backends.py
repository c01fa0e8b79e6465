# SPDX-License-Identifier: Apache-2.0
"""The names of operators and of backends."""

from __future__ import annotations

OPERATORS = ("residual_map", "gcu", "rcu")
BACKENDS = ("reference", "cpu", "triton", "cuda")
# The CUDA kernels on CPU tensors, in a build for tests: can be asked for, is never chosen.
EMULATED = "cuda-emulated"

# SPDX-License-Identifier: Apache-2.0
"""``gcu`` on Triton."""

from __future__ import annotations

from grcsf_kernels.triton.gcu.backward_kernels import backward
from grcsf_kernels.triton.gcu.forward_kernels import forward

__all__ = ["backward", "forward"]

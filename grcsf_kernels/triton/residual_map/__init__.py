# SPDX-License-Identifier: Apache-2.0
"""``residual_map`` on Triton."""

from __future__ import annotations

from grcsf_kernels.triton.residual_map.kernels import backward, forward

__all__ = ["backward", "forward"]

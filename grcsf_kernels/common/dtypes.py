# SPDX-License-Identifier: Apache-2.0
"""Which dtype goes with which."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken, and of gates, weights and scores."""
    return torch.float64 if dtype == torch.float64 else torch.float32

# SPDX-License-Identifier: Apache-2.0
"""``rcu`` on Triton: which kernels run.

- One map channel and patches of up to ``_PATCH_VOXELS`` voxels: one program a patch, attention from
  a table that the program makes (``small_patch.py``).
- One map channel and larger patches, up to the whole volume: programs share a patch; the table is
  made by a reduction in two stages and read in one pass (``large_patch.py``).
- More map channels: attention with online softmax on tensor cores (``direct/``).

Which of them is a matter of sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

from torch import Tensor

from grcsf_kernels.triton.rcu import direct, large_patch, small_patch

# Beyond this one program would be busy with a patch for too long.
_PATCH_VOXELS = 4096


def _path(residual: Tensor, patch: Sequence[int]) -> ModuleType:
    if residual.shape[2] > 1:
        return direct
    return small_patch if prod(patch) <= _PATCH_VOXELS else large_patch


def forward(x: Tensor, residual: Tensor, *weights_and_patch: Any) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    return _path(residual, weights_and_patch[-1]).forward(x, residual, *weights_and_patch)


def backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    *weights_and_options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of all ten tensors, in the order of the operator (None where not needed)."""
    return _path(residual, weights_and_options[-2]).backward(
        grad_out, grad_scores, scores, x, residual, *weights_and_options
    )

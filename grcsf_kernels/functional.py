# SPDX-License-Identifier: Apache-2.0
"""Functions on tensors: the operators, masks of patches, and volumes as tokens.

What :mod:`torch.nn.functional` is to ``torch.nn``. The three operators are also at the top of the
package.
"""

from __future__ import annotations

from grcsf_kernels.masking import complementary_masks, random_masks
from grcsf_kernels.ops import RCUWeights, gcu, rcu, residual_map
from grcsf_kernels.patches import patchify, unpatchify

__all__ = [
    "RCUWeights",
    "complementary_masks",
    "gcu",
    "patchify",
    "random_masks",
    "rcu",
    "residual_map",
    "unpatchify",
]

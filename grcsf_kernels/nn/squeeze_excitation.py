# SPDX-License-Identifier: Apache-2.0
"""Channel gates by squeeze-and-excitation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.nn.layers import OpenLinear, call
from grcsf_kernels.ops.checks import check_counts
from grcsf_kernels.ops.registration import without_autocast


class SqueezeExcitation(nn.Module):
    """A gate per channel from the channels' means.

    ``gate = sigmoid(excite(relu(squeeze(mean over voxels))))``. The gate is computed in float32
    (float64 for float64 input) whatever the dtype of the module and of autocast, so that it can go
    straight into :func:`grcsf_kernels.gcu`.

    Args:
        channels: channels C of the input.
        reduction: the hidden layer has ``max(C // reduction, 1)`` units.

    Raises:
        TypeError: ``channels`` or ``reduction`` is no integer.
        ValueError: it is below 1.

    Source: squeeze-and-excitation networks (Hu et al., CVPR 2018, arXiv 1709.01507).
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_counts("SqueezeExcitation", channels=channels, reduction=reduction)
        hidden = max(channels // reduction, 1)
        # Means of normalized features hardly differ between inputs, so about half of the rectified
        # units would start off for all of them and never learn. This starts them on.
        self.squeeze = OpenLinear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [B, C] of ``x`` [B, C, *S], float32 (float64 for float64 input)."""
        dtype = compute_dtype(x.dtype)
        with without_autocast(x.device.type):
            means = x.flatten(2).mean(dim=2, dtype=dtype)
            hidden = F.relu(call(self.squeeze, means))
            return torch.sigmoid(call(self.excite, hidden))

# SPDX-License-Identifier: Apache-2.0
"""The loss of segmentation, in parts that add up over processes and over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.losses import FocalLoss
from torch import Tensor


class DiceFocal:
    """Dice over the whole batch, plus focal loss: MONAI's ``DiceFocalLoss(batch=True)`` in parts.

    Dice over a batch is no mean of the Dice of its parts: a crop without a lesion has none of its
    own. Its three sums do add up, so :meth:`parts` gives those of some crops, and :meth:`loss` the
    loss from their sum over all crops.
    """

    def __init__(self, smooth: float = 1e-5) -> None:
        self._smooth = smooth
        self._focal = FocalLoss()

    def parts(self, logits: Tensor | Sequence[Tensor], label: Tensor, share: float) -> Tensor:
        """[levels, 4]: overlap, size of the prediction, size of the label, focal loss.

        Args:
            logits: [B, 1, *S], or one for each level of deep supervision, full resolution first.
            label: [B, 1, *S] of 0 and 1. A voxel of a coarser level has a lesion where one of its
                voxels does: small lesions do not vanish.
            share: of these crops in all crops of the step.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        shrink = F.adaptive_max_pool3d if label.ndim == 5 else F.adaptive_max_pool2d
        rows = []
        for level in levels:
            level = level.float()
            if level.shape[2:] != label.shape[2:]:
                label = shrink(label, level.shape[2:])
            probability = level.sigmoid()
            rows.append(
                torch.stack(
                    [
                        (probability * label).sum(),
                        probability.sum(),
                        label.sum(),
                        self._focal(level, label) * share,
                    ]
                )
            )
        return torch.stack(rows)

    def loss(self, parts: Tensor) -> Tensor:
        """The loss, a scalar; each level of deep supervision weighs half of the one above it."""
        overlap, predicted, labeled, focal = parts.unbind(dim=1)
        dice = 1 - (2 * overlap + self._smooth) / (predicted + labeled + self._smooth)
        weights = 0.5 ** torch.arange(len(parts), device=parts.device, dtype=parts.dtype)
        return ((dice + focal) * weights).sum() / weights.sum()

# SPDX-License-Identifier: Apache-2.0
"""The score of each patch from the means of its voxels, and its gradients.

A patch has C + K * c means, next to (C + K * c) * P voxels: eager PyTorch on tensors of one row a
patch. All functions are deterministic and take any number of patches, none too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _hidden(means: Tensor, score_weight1: Tensor, score_bias1: Tensor) -> Tensor:
    """[B * G, m] before the ReLU; the bias [B, m] is that of the patch's sample."""
    batch, units = score_bias1.shape
    if batch == 0:
        return means.new_zeros((0, units))
    return (
        (means @ score_weight1.T).unflatten(0, (batch, -1)).add_(score_bias1[:, None]).flatten(0, 1)
    )


def scores_of(
    means: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
) -> Tensor:
    """Scores [B * G].

    Args:
        means: [B * G, C + K * c], patches of one sample after the other.
        score_weight1: [m, C + K * c].
        score_bias1: [B, m].
        score_weight2: [m].
        score_bias2: a scalar.
    """
    hidden = _hidden(means, score_weight1, score_bias1).relu_()
    return torch.sigmoid(hidden @ score_weight2 + score_bias2)


def score_gradients(
    grad_score: Tensor,
    scores: Tensor,
    means: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of means [B * G, C + K * c], and of the four weights in their order.

    Args:
        grad_score: [B * G], all of the gradient that reaches the scores.
        scores: [B * G].
        means, score_weight1, score_bias1, score_weight2: as in :func:`scores_of`.
    """
    batch = score_bias1.shape[0]
    hidden = _hidden(means, score_weight1, score_bias1)
    grad_logit = grad_score * scores * (1 - scores)
    grad_hidden = (grad_logit[:, None] * score_weight2).masked_fill_(hidden <= 0, 0)
    grad_bias1 = (
        grad_hidden.unflatten(0, (batch, -1)).sum(dim=1) if batch else torch.zeros_like(score_bias1)
    )
    return (
        grad_hidden @ score_weight1,
        grad_hidden.T @ means,
        grad_bias1,
        grad_logit @ hidden.clamp(min=0),
        grad_logit.sum(),
    )

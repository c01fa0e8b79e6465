# SPDX-License-Identifier: Apache-2.0
"""Global attention of rcu, exactly, at a few voxels: the check where the reference takes hours."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.cases import Inputs

_VOXELS = 16


def picked(volume: Tensor) -> Tensor:
    """Values of [1, C, *S] at some voxels, [C, n]; the same voxels for every call."""
    flat = volume.flatten(2)[0]
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randint(flat.shape[1], (_VOXELS,), generator=generator)
    return flat[:, voxels.to(flat.device)]


def expected(inputs: Inputs) -> Tensor:
    """``out`` with ``patch_size=None`` at the picked voxels, in textbook order and float64."""
    x, residual, *weights = (tensor.detach() for tensor in inputs.arguments)
    query, query_bias, value, value_bias, weight1, bias1, weight2, bias2 = (
        weight.double() for weight in weights
    )
    means = [tensor.flatten(2)[0].double().mean(dim=1) for tensor in (x, residual.flatten(1, 2))]
    hidden = (weight1 @ torch.cat(means) + bias1[0]).relu()
    score = torch.sigmoid(weight2 @ hidden + bias2)
    own = picked(x).double()
    added = value_bias.sum(dim=0)[:, None]
    for k, maps in enumerate(residual[0]):
        keys = maps.flatten(1).double()  # [c, V]
        queries = torch.einsum("hcx,xn->hnc", query[k], own) + query_bias[k][:, None]
        for head, own_queries in enumerate(queries):
            mean = torch.softmax(own_queries @ keys, dim=-1) @ keys.T  # [n, c]
            added = added + value[k, :, head] @ mean.T
    return own + score * added

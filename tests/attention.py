# SPDX-License-Identifier: Apache-2.0
"""Textbook multi-head cross-attention from the layers of an ``nn.RCU``, which it calls."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def textbook(module, x, residual, context=None):
    """Unabsorbed: every patch alone, queries, keys and values by the module's linear layers."""
    space = x.shape[2:]
    patch = module.patch_size
    patch = space if patch is None else (patch,) * len(space) if isinstance(patch, int) else patch
    if residual.ndim == x.ndim:
        residual = residual.unsqueeze(2)
    batch, heads = x.shape[0], module.num_heads
    out, rows = torch.zeros_like(x), []
    starts = [range(0, size, step) for size, step in zip(space, patch, strict=True)]
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        voxels = x[(..., *box)].flatten(2).transpose(1, 2)
        maps = residual[(..., *box)].flatten(3).transpose(2, 3)
        added = 0
        for k in range(module.num_maps):

            def split(tokens):
                return tokens.unflatten(2, (heads, -1)).transpose(1, 2)

            query = split(module.query[k](voxels))
            key, value = split(module.key[k](maps[:, k])), split(module.value[k](maps[:, k]))
            attended = F.scaled_dot_product_attention(query, key, value)
            attended = module.output[k](attended.transpose(1, 2).flatten(2))
            added = added + module.map_weight[k] * attended
        described = [voxels.mean(1), maps.mean(2).flatten(1)]
        described += [] if context is None else [context]
        hidden = module.score_hidden(torch.cat(described, dim=1)).relu()
        score = torch.sigmoid(module.score_output(hidden))
        result = (voxels + score[:, None] * added).transpose(1, 2)
        out[(..., *box)] = result.unflatten(2, x[(..., *box)].shape[2:])
        rows.append(score[:, 0])
    grid = [len(s) for s in starts]
    return out, torch.stack(rows, dim=1).view(batch, *grid)

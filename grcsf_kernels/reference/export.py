# SPDX-License-Identifier: Apache-2.0
"""The reference as graphs: what ``torch.export`` and ONNX put in the place of an operator.

The same formulas as in ``gcu.py`` and ``rcu.py`` beside it, without writes in place and without
loops whose length depends on the batch, so that the batch stays free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.patches import Region, regions
from grcsf_kernels.reference import gcu as gcu_reference
from grcsf_kernels.reference.interpolation import upsample
from grcsf_kernels.reference.rcu import centered

# Logits of one chunk for each sample, in values: 256 MiB in float32. A graph has a copy of the
# attention for every chunk.
_CHUNK = 1 << 26


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: ``grcsf`` operators to PyTorch's own.

    For ``gcu`` and ``rcu``, forward only; and for adaptive pooling, which ONNX does not have.
    """
    aten = torch.ops.aten
    return {
        torch.ops.grcsf.gcu.default: _gcu,
        torch.ops.grcsf.rcu.default: _rcu,
        aten.adaptive_avg_pool2d.default: _adaptive_mean,
        aten.adaptive_avg_pool3d.default: _adaptive_mean,
    }


def _adaptive_mean(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """``F.adaptive_avg_pool``, one axis after the other: the windows are products of intervals."""
    for axis, wanted in enumerate(output_size, start=2):
        size = int(x.shape[axis])
        if size == wanted:
            continue
        if size % wanted == 0:
            x = x.unflatten(axis, (wanted, size // wanted)).mean(dim=axis + 1)
            continue
        intervals = ((i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted))
        x = torch.cat(
            [x.narrow(axis, a, b - a).mean(dim=axis, keepdim=True) for a, b in intervals], dim=axis
        )
    return x


def _gcu(
    skip: Tensor,
    deep: Tensor,
    skip_gate: Tensor,
    deep_gate: Tensor,
    *,
    compensation: str = "dissimilarity",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    gated = gcu_reference._gated(skip, skip_gate)
    # Runtimes have no interpolation of volumes in float64.
    up = upsample(gcu_reference._gated(deep, deep_gate), skip.shape[2:])

    def norm(vectors: Tensor) -> Tensor:
        return (vectors * vectors).sum(dim=1, keepdim=True).sqrt().clamp(min=eps)

    cosine = (gated * up).sum(dim=1, keepdim=True) / (norm(gated) * norm(up))
    dissimilarity = 1 - cosine
    strength = dissimilarity if compensation == "dissimilarity" else cosine
    compensated = skip.to(strength.dtype) * (1 + strength)
    return compensated.to(skip.dtype), dissimilarity.to(skip.dtype)


def _rcu(
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
    *,
    patch_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    space = [int(size) for size in x.shape[2:]]
    patch = (
        space if patch_size is None else [min(p, s) for p, s in zip(patch_size, space, strict=True)]
    )
    maps, heads, map_channels, _ = query_weight.shape
    dtype = query_weight.dtype
    constant = value_bias.sum(dim=0)
    outs, scores = [], []
    for region in regions(space, patch):
        own = _windows(region, x).to(dtype)
        own_maps = _windows(region, residual.flatten(1, 2)).to(dtype)
        means = torch.cat([own.mean(dim=2), own_maps.mean(dim=2)], dim=-1)
        hidden = (means @ score_weight1.T + score_bias1[:, None]).relu()
        score = torch.sigmoid(hidden @ score_weight2 + score_bias2)
        keys = own_maps.unflatten(3, (maps, map_channels)).transpose(2, 3)
        weights = (query_weight, query_bias, value_weight)
        patches, voxels = own.shape[1], own.shape[2]
        step = max(1, _CHUNK // (voxels * voxels * maps * heads))
        added = torch.cat(
            [
                _added(own[:, n : n + step], keys[:, n : n + step], *weights)
                for n in range(0, patches, step)
            ],
            dim=1,
        )
        result = own + score[..., None, None] * (added + constant)
        outs.append(_volume(region, result.to(x.dtype)))
        scores.append(score.unflatten(1, region.counts))
    blocks = [1 + (size % p > 0) for size, p in zip(space, patch, strict=True)]
    return _assemble(outs, blocks), _assemble(scores, blocks, first_axis=1)


def _added(own: Tensor, keys: Tensor, *weights: Tensor) -> Tensor:
    """What attention adds to ``own`` [B, g, i, C]; ``keys`` [B, g, k, j, c]."""
    query_weight, query_bias, value_weight = weights
    keys, first = centered(keys)
    queries = torch.einsum("bgix,khcx->bgkihc", own, query_weight) + query_bias[:, None]
    logits = queries.flatten(3, 4) @ keys.mT
    expected = torch.softmax(logits, dim=-1) @ keys + first
    expected = expected.unflatten(3, (own.shape[2], query_weight.shape[1]))
    return torch.einsum("bgkihc,kxhc->bgix", expected, value_weight)


def _windows(region: Region, volume: Tensor) -> Tensor:
    """[B, n, *S] to [B, patches, P, n]."""
    block = volume[region.space]
    axes = len(region.patch)
    for axis in reversed(range(axes)):
        block = block.unflatten(2 + axis, (region.counts[axis], region.patch[axis]))
    grid, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    block = block.permute(0, *grid, *inner, 1)
    return block.flatten(1 + axes, 2 * axes).flatten(1, axes)


def _volume(region: Region, windows: Tensor) -> Tensor:
    """[B, patches, P, n] to the block [B, n, *s] of the volume."""
    axes = len(region.patch)
    block = windows.unflatten(2, region.patch).unflatten(1, region.counts)
    order = [part for axis in range(axes) for part in (1 + axis, 1 + axes + axis)]
    block = block.permute(0, 1 + 2 * axes, *order)
    for axis in range(axes):
        block = block.flatten(2 + axis, 3 + axis)
    return block


def _assemble(parts: list[Tensor], blocks: Sequence[int], first_axis: int = 2) -> Tensor:
    """Blocks in row-major order to one tensor."""
    for axis in reversed(range(len(blocks))):
        count = blocks[axis]
        groups = [parts[i : i + count] for i in range(0, len(parts), count)]
        parts = [torch.cat(group, dim=first_axis + axis) for group in groups]
    return parts[0]

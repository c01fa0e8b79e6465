# SPDX-License-Identifier: Apache-2.0
"""``rcu`` with programs that share a patch: how they are started (``large_patch_kernels.py``).

What lies between the launches are PyTorch's operations on one row a patch; nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.triton import launch
from grcsf_kernels.triton.rcu.direct.tiles import Geometry, geometry
from grcsf_kernels.triton.rcu.large_patch_kernels import (
    grcsf_rcu_volume_finish,
    grcsf_rcu_volume_forward,
    grcsf_rcu_volume_queries,
    grcsf_rcu_volume_survey,
    grcsf_rcu_volume_table,
    grcsf_rcu_volume_values,
)
from grcsf_kernels.triton.rcu.score import score_gradients, scores_of
from grcsf_kernels.triton.rcu.small_patch import STEP, column_constants, gradients, weight_slots

# A table and the sums it is made from: this share of x, and between so many nodes.
_SHARE = 0.01
_LEAST_NODES, _MOST_NODES = 64, 1024
# Pieces that make one table: enough of them keep a GPU busy with a single patch.
_SPLITS = 64


@dataclass(frozen=True)
class _Patches:
    """What every launch for one call takes: sizes, and the kernels' constants."""

    x: Tensor
    residual: Tensor
    place: Geometry
    columns: dict[str, int]
    tiles: dict[str, int]
    constants: dict[str, Any]

    @property
    def count(self) -> int:
        """Patches of all samples."""
        return self.place.patches

    @property
    def chunk(self) -> int:
        """Voxels of a piece: whole tiles of voxels."""
        return self.tiles["CHUNK"]

    @property
    def pieces(self) -> int:
        """Pieces of a patch."""
        return launch.blocks(self.place.voxels, self.chunk)

    def geometry(self) -> list[int]:
        """Run-time sizes, in the order that the kernels take them."""
        return [*self.place.sizes, *self.place.grid, *self.place.patch]

    def strides(self) -> list[int]:
        """Run-time strides of x and of a map."""
        return [*self.place.strides, prod(self.place.sizes)]

    def pass_constants(self) -> dict[str, Any]:
        """Constants of a pass over the voxels."""
        names = ("BLOCK_V", "BLOCK_C", "KEYS", "num_warps", "num_stages")
        return self.columns | {name: self.tiles[name] for name in names} | self.constants


def _patches(x: Tensor, residual: Tensor, query_weight: Tensor, patch: Sequence[int]) -> _Patches:
    precision = launch.precision(x)
    columns = column_constants(query_weight, precision)
    tiles = launch.parameters("rcu", "volume", x)
    tiles["BLOCK_C"] = min(tiles["BLOCK_C"], launch.power_of_2(columns["C"], 16))
    constants = {"WIDE": launch.wide(x, residual), "PRECISION": precision}
    return _Patches(x, residual, geometry(x, patch), columns, tiles, constants)


@dataclass(frozen=True)
class _Tables:
    """Means of each patch [patches, C + K], and its tables (``large_patch_kernels.py``)."""

    means: Tensor
    ranges: Tensor
    nodes: Tensor
    table: Tensor
    most: int


def _tables(own: _Patches, weights: Sequence[Tensor], fields: int) -> _Tables:
    """Survey the patches and make their tables: 2 ``fields`` a node, 3 for backward."""
    x, query_weight, maps = own.x, weights[0], own.columns["K"]
    hidden = weights[4].shape[0]
    shape = (own.count, own.pieces)
    lanes, padded = own.columns["N"], launch.power_of_2(maps)
    means = query_weight.new_zeros((*shape, own.columns["C"] + maps))
    a_low, a_high = query_weight.new_empty((2, *shape, lanes))
    r_low, r_high = query_weight.new_empty((2, *shape, padded))
    names = ("BLOCK_V", "BLOCK_C", "num_warps", "num_stages")
    launch.launch(
        grcsf_rcu_volume_survey,
        own.count * own.pieces,
        x,
        own.residual,
        *weights[:2],
        weights[4],
        means,
        a_low,
        a_high,
        r_low,
        r_high,
        *own.geometry(),
        *own.strides(),
        own.pieces,
        own.chunk,
        M=hidden,
        M2=launch.power_of_2(hidden),
        K2=padded,
        **own.columns,
        **{name: own.tiles[name] for name in names},
        **own.constants,
    )
    averages = means.sum(dim=1)
    heads = own.columns["HEADS"]
    low = a_low.amin(dim=1)[:, : maps * heads].unflatten(1, (maps, heads)).amin(dim=2)
    high = a_high.amax(dim=1)[:, : maps * heads].unflatten(1, (maps, heads)).amax(dim=2)
    least, greatest = r_low.amin(dim=1)[:, :maps], r_high.amax(dim=1)[:, :maps]
    # Clamped, so that a constant map is its own center exactly.
    center = torch.minimum(torch.maximum(averages[:, own.columns["C"] :], least), greatest)

    voxels, nodes_of_block = own.place.voxels, 2 * own.tiles["ROWS"]
    tables = own.count * maps
    splits = max(1, min(_SPLITS, launch.blocks(4 * _SPLITS, max(tables, 1))))
    chunk = own.tiles["BLOCK_J"] * launch.blocks(voxels, own.tiles["BLOCK_J"] * splits)
    splits = launch.blocks(voxels, chunk)
    affordable = _SHARE * voxels * own.columns["C"] * x.element_size()
    affordable /= maps * (4 * fields + 16 * splits)
    most = min(launch.power_of_2(max(int(affordable), _LEAST_NODES) + 1) // 2, _MOST_NODES)
    has_tables = x.dtype in STEP
    if has_tables:
        needed = ((high - low) * (greatest - least) / STEP[x.dtype]).amax(dim=1)
        # False also for NaN: what is not finite takes the direct sum.
        tabulated = needed <= most - 2
        steps = torch.where(tabulated, needed, 0).to(torch.int32) + 2
        nodes = (steps + nodes_of_block - 1) // nodes_of_block * nodes_of_block
        nodes = torch.where(tabulated, nodes.clamp(max=most), 0).to(torch.int32)
    else:
        nodes = torch.zeros(own.count, dtype=torch.int32, device=x.device)
    step = (high - low) / (nodes - 1).clamp(min=1)[:, None]
    ranges = torch.stack([low, step, least, greatest, center], dim=-1)
    table = query_weight.new_empty((own.count, maps, most, fields) if has_tables else (1,))
    if has_tables:
        partial = query_weight.new_empty((own.count, maps, splits, 4, most))
        blocks = launch.blocks(most, nodes_of_block)
        shared = {"K": maps, "T": most, "ROWS": own.tiles["ROWS"], "FIELDS": fields}
        launch.launch(
            grcsf_rcu_volume_table,
            tables * splits * blocks,
            own.residual,
            ranges,
            nodes,
            partial,
            *own.geometry(),
            prod(own.place.sizes),
            blocks,
            splits,
            chunk,
            BLOCK_J=own.tiles["BLOCK_J"],
            WIDE=own.constants["WIDE"],
            num_warps=own.tiles["num_warps"],
            **shared,
        )
        launch.launch(
            grcsf_rcu_volume_finish,
            tables * blocks,
            ranges,
            nodes,
            partial,
            table,
            blocks,
            splits,
            num_warps=1,
            **shared,
        )
    return _Tables(averages, ranges, nodes, table, most if has_tables else 0)


def forward(x: Tensor, residual: Tensor, *weights_and_patch: Any) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    *weights, patch = weights_and_patch
    own = _patches(x, residual, weights[0], patch)
    found = _tables(own, weights, fields=2)
    scores = scores_of(found.means, *weights[4:])
    out = torch.empty_like(x)
    launch.launch(
        grcsf_rcu_volume_forward,
        own.count * own.pieces,
        x,
        residual,
        *weights[:4],
        scores,
        found.ranges,
        found.nodes,
        found.table,
        out,
        *own.geometry(),
        *own.strides(),
        own.pieces,
        own.chunk,
        T=found.most,
        FIELDS=2,
        **own.pass_constants(),
    )
    return out, scores.view(x.shape[0], *own.place.grid[3 - len(patch) :])


def backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    *weights_and_options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of all ten tensors, in the order of the operator (None where not needed)."""
    *weights, patch, needs = weights_and_options
    query_weight = weights[0]
    own = _patches(x, residual, query_weight, patch)
    found = _tables(own, weights, fields=3)
    items = own.count * own.pieces
    programs = min(items, own.tiles["PROGRAMS"])
    grad_score = query_weight.new_empty((own.count, own.pieces))
    slots = weight_slots(query_weight, programs)
    of_query, of_query_bias, of_value, of_value_bias = slots
    sizes = [*own.geometry(), *own.strides(), own.pieces, own.chunk, items, programs]
    constants = own.pass_constants() | {"T": found.most, "FIELDS": 3}
    launch.launch(
        grcsf_rcu_volume_values,
        programs,
        grad_out,
        x,
        residual,
        *weights[:4],
        scores,
        found.ranges,
        found.nodes,
        found.table,
        grad_score,
        of_value,
        of_value_bias,
        *sizes,
        **constants,
    )
    total = grad_scores.flatten() + grad_score.sum(dim=1)
    grad_means, *of_score = score_gradients(total, scores.flatten(), found.means, *weights[4:7])
    grad_x = torch.empty_like(x)
    launch.launch(
        grcsf_rcu_volume_queries,
        programs,
        grad_out,
        x,
        residual,
        *weights[:3],
        scores,
        grad_means,
        found.ranges,
        found.nodes,
        found.table,
        grad_x,
        of_query,
        of_query_bias,
        *sizes,
        **constants,
    )
    return gradients(
        grad_x, slots, of_score, grad_means, found.means, grad_out, scores, x, residual, weights,
        patch, needs,
    )  # fmt: skip

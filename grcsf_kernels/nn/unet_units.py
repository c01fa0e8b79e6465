# SPDX-License-Identifier: Apache-2.0
"""The units of a U-Net: a GCU for every skip, and RCUs for some levels of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from grcsf_kernels.nn.gcu import GCU
from grcsf_kernels.nn.rcu import RCU

_POOL: Mapping[int, Callable[..., Tensor]] = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


def make_gcus(encoded: Sequence[int], **options: Any) -> nn.ModuleList:
    """A GCU for each skip, from the channels of the encoder's features, the bottleneck last."""
    return nn.ModuleList(GCU(own, deeper, **options) for own, deeper in pairwise(encoded))


def make_rcus(
    decoded: Sequence[int], levels: Sequence[int], num_maps: int, **options: Any
) -> nn.ModuleDict:
    """RCUs by level, from the channels of the decoder's features."""
    chosen = sorted(set(levels))
    return nn.ModuleDict({str(n): RCU(decoded[n], num_maps, **options) for n in chosen})


def apply_gcus(
    units: nn.ModuleList, features: Sequence[Tensor], run: Callable[..., Tensor]
) -> list[Tensor]:
    """Apply the GCU of each level to its skip; without units, return the features unchanged.

    ``run`` calls a module with its arguments.
    """
    skips = [
        run(unit, skip, deep) for unit, (skip, deep) in zip(units, pairwise(features), strict=False)
    ]
    return [*skips, *features[len(skips) :]]


def decoder_hook(
    units: nn.ModuleDict,
    maps: Tensor | None,
    features: Sequence[Tensor],
    run: Callable[..., Tensor],
) -> Callable[[int, Tensor], Tensor]:
    """Return a callback that applies the RCU of a level, or the identity where it has none.

    The context is the pooled bottleneck, the last of the encoder's ``features``.
    """
    context = features[-1].flatten(2).mean(dim=2)

    def after(level: int, x: Tensor) -> Tensor:
        if maps is None or str(level) not in units:
            return x
        # Means over exactly the voxels that a voxel of this level stands for.
        pooled = _POOL[x.ndim](maps, x.shape[2:])
        return run(units[str(level)], x, pooled, context)

    return after

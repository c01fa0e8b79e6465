# SPDX-License-Identifier: Apache-2.0
"""Random arguments of operators: sizes, values, and where in memory they lie."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.dispatch import OPERATORS

# Values of one argument, and of the attention of one call of the reference.
MOST_VALUES = 40_000
MOST_LOGITS = 4_000_000

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)

# The smallest normal number and what counts as large, for values that still leave room for sums.
_TINY = {torch.float64: 2e-308, torch.float16: 6e-5}
_LARGE = {torch.float16: 30.0}


@dataclass
class Call:
    """One call of an operator.

    Attributes:
        operator: its name.
        dtype: of the data.
        names: of the arguments.
        arguments: tensors, or None.
        options: keyword arguments.
        needs: of each argument, whether its gradient is asked for.
        notes: what is special about it.
    """

    operator: str
    dtype: torch.dtype
    names: list[str]
    arguments: list[Tensor | None]
    options: dict[str, Any]
    needs: list[bool]
    notes: list[str] = field(default_factory=list)


class Maker:
    """Random tensors of one case; the case's number says all of it."""

    def __init__(self, case: int) -> None:
        self.random = random.Random(case)
        self.generator = torch.Generator().manual_seed(case)
        self.notes: list[str] = []

    def size(self, most: int = 9) -> int:
        """A size of an axis: often 1, mostly small."""
        if self.random.random() < 0.2:
            return 1
        if self.random.random() < 0.06:
            return self.random.randint(10, 70)
        return self.random.randint(2, most)

    def space(self) -> list[int]:
        """Two or three sizes."""
        return [self.size() for _ in range(self.random.choice((2, 3, 3)))]

    def values(self, shape: list[int], dtype: torch.dtype, *, special: bool = True) -> Tensor:
        """Random values, some of a kind that breaks things."""
        found = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.random.random() if special else 1.0
        large = _LARGE.get(dtype, 1e3)
        if kind < 0.05:
            found.zero_()
        elif kind < 0.1:
            found = torch.full_like(found, self.random.gauss(0, 1))
        elif kind < 0.16:
            found *= large
        elif kind < 0.22:
            found *= 1e-3
        elif kind < 0.26:
            found *= _TINY.get(dtype, 1e-38) * self.random.choice((1, 0.01))
            self.notes.append("denormal")
        elif kind < 0.3:
            found = found * 0.1 + large / 10
        elif kind < 0.36 and found.ndim > 2:
            # Voxels that are nothing but zeros, as air.
            found *= torch.rand(shape[2:], generator=self.generator) < 0.5
        found = found.to(dtype)
        if special and found.numel() and self.random.random() < 0.06:
            bad = self.random.choice((math.nan, math.inf, -math.inf))
            found.view(-1)[self.random.randrange(found.numel())] = bad
            self.notes.append("not finite")
        return found

    def placed(self, tensor: Tensor) -> Tensor:
        """The tensor somewhere in memory: any order of axes, offset, gaps, stride 0, odd strides.

        An expanded tensor has other values: the first along an axis, for all.
        """
        choose = self.random.random
        if tensor.ndim and choose() < 0.08:
            axis = self.random.randrange(tensor.ndim)
            if tensor.shape[axis] > 0:
                tensor = tensor.narrow(axis, 0, 1).expand(tensor.shape)
        elif tensor.ndim and choose() < 0.7:
            tensor = self._in_order(tensor)
        return self._odd(tensor) if choose() < 0.5 else tensor

    def _in_order(self, tensor: Tensor) -> Tensor:
        """A copy in memory that is larger than it, poisoned with NaN around it."""
        axes = list(range(tensor.ndim))
        kind = self.random.random()
        if kind < 0.4 and tensor.ndim in (4, 5):
            axes = [0, *axes[2:], 1]
        elif kind < 0.7:
            self.random.shuffle(axes)
        steps = [self.random.choice((1, 1, 1, 1, 2)) for _ in axes]
        extra = [self.random.choice((0, 0, 0, 1, 3)) for _ in axes]
        offset = self.random.choice((0, 0, 1, 3, 5))
        shape = [
            tensor.shape[axis] * step + more
            for axis, step, more in zip(axes, steps, extra, strict=True)
        ]
        poison = True if tensor.dtype == torch.bool else math.nan
        memory = torch.full((math.prod(shape) + offset,), poison, dtype=tensor.dtype)
        place = memory[offset:].view(shape)
        for position, axis in enumerate(axes):
            place = place.narrow(position, 0, tensor.shape[axis] * steps[position])
            place = place[(slice(None),) * position + (slice(None, None, steps[position]),)]
        place = place.permute([axes.index(axis) for axis in range(tensor.ndim)])
        place.copy_(tensor)
        return place

    def _odd(self, tensor: Tensor) -> Tensor:
        strides = [
            self.random.choice((0, 1, 3, 4097)) if size == 1 else stride
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())

    # ---- Calls -------------------------------------------------------------------------------

    def call(self) -> Call:
        """A random call of a random operator that has to work."""
        operator = self.random.choice(OPERATORS)
        dtype = self.random.choice(DTYPES)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch = 0 if self.random.random() < 0.03 else self.random.choice((1, 1, 2, 3))
        channels = self.random.choice((1, 2, 3, 4, 5, 8, 16, 17, 32, 33))
        space = self.space()
        while max(batch, 1) * channels * math.prod(space) > MOST_VALUES:
            channels, space = max(1, channels // 2), [max(1, size // 2) for size in space]
        make = {"residual_map": self._residual_map, "gcu": self._gcu, "rcu": self._rcu}[operator]
        self.notes = []
        names, arguments, options = make(dtype, wide, batch, channels, space)
        arguments = [None if a is None else self.placed(a) for a in arguments]
        needs = [a is not None and a.is_floating_point() for a in arguments]
        if self.random.random() < 0.3:
            needs = [need and self.random.random() < 0.5 for need in needs]
            needs[self.random.randrange(2)] = True
        return Call(operator, dtype, names, arguments, options, needs, self.notes)

    def _residual_map(
        self, dtype: torch.dtype, wide: torch.dtype, batch: int, channels: int, space: list[int]
    ) -> Any:
        patch = [self.random.choice([p for p in range(1, s + 1) if s % p == 0]) for s in space]
        tokens = math.prod(s // p for s, p in zip(space, patch, strict=True))
        values = math.prod(patch) * channels
        draws = self.random.choice((1, 1, 2, 3, 4, 7))
        lower = {torch.float64: DTYPES, torch.float32: (torch.float32, *DTYPES[3:])}
        prediction_dtype = dtype if self.random.random() < 0.7 else None
        if prediction_dtype is None:
            prediction_dtype = self.random.choice(lower.get(dtype, (dtype, torch.bfloat16)))
        hidden = None
        if self.random.random() < 0.6:
            hidden = torch.rand(draws, batch, tokens, generator=self.generator) < 0.6
        options = {
            "patch_size": patch,
            "normalized_target": values > 1 and self.random.random() < 0.5,
            "average": self.random.choice(("residuals", "reconstructions")),
            "eps": self.random.choice((1e-6, 1e-2, 1.0)),
        }
        arguments = [
            self.values([batch, channels, *space], dtype),
            self.values([draws, batch, tokens, values], prediction_dtype),
            hidden,
        ]
        return ["image", "prediction", "hidden"], arguments, options

    def _gcu(
        self, dtype: torch.dtype, wide: torch.dtype, batch: int, channels: int, space: list[int]
    ) -> Any:
        kind = self.random.random()
        if kind < 0.5:
            deep = [(size + 1) // 2 for size in space]
        elif kind < 0.6:
            deep = list(space)
        else:
            deep = [
                self.random.choice((1, -(-s // 3), s, self.random.randint(1, s + 3))) for s in space
            ]
        options = {
            "compensation": self.random.choice(("dissimilarity", "similarity")),
            "eps": self.random.choice((1e-6, 1e-6, 1e-3, 1.0)),
        }
        arguments = [
            self.values([batch, channels, *space], dtype),
            self.values([batch, channels, *deep], dtype),
            self.values([batch, channels], wide),
            self.values([batch, channels], wide),
        ]
        # Of an infinite gate, the order of gate and interpolation decides on Inf or NaN.
        arguments[3].masked_fill_(arguments[3].isinf(), math.nan)
        return ["skip", "deep", "skip_gate", "deep_gate"], arguments, options

    def _rcu(
        self, dtype: torch.dtype, wide: torch.dtype, batch: int, channels: int, space: list[int]
    ) -> Any:
        maps, heads = self.random.choice((1, 1, 2, 3)), self.random.choice((1, 2, 3, 4))
        own = self.random.choice((1, 1, 1, 2, 3))
        hidden = self.random.choice((1, 3, 8))
        patch = [self.random.randint(1, min(size + 2, 9)) for size in space]
        if self.random.random() < 0.4:
            patch = [self.random.choice((1, 2, 4, 8))] * len(space)
        whole: list[int] | None = None if self.random.random() < 0.25 else patch
        sizes = space if whole is None else [min(p, s) for p, s in zip(patch, space, strict=True)]
        while max(batch, 1) * math.prod(space) * math.prod(sizes) * maps * heads > MOST_LOGITS:
            space, sizes = [-(-s // 2) for s in space], [-(-s // 2) for s in sizes]
            whole = None if whole is None else sizes
        shapes = {
            "query_weight": [maps, heads, own, channels],
            "query_bias": [maps, heads, own],
            "value_weight": [maps, channels, heads, own],
            "value_bias": [maps, channels],
            "score_hidden_weight": [hidden, channels + maps * own],
            "score_hidden_bias": [batch, hidden],
            "score_output_weight": [hidden],
            "score_output_bias": [],
        }
        map_shape = [batch, maps, *space]
        if own > 1 or self.random.random() < 0.7:
            map_shape.insert(2, own)
        arguments = [
            self.values([batch, channels, *space], dtype),
            self.values(map_shape, dtype),
            *(self.values(shape, wide) for shape in shapes.values()),
        ]
        return ["x", "residual", *shapes], arguments, {"patch_size": whole}

# SPDX-License-Identifier: Apache-2.0
"""Volumes cut into patches: tokens of an autoencoder, and windows of :func:`grcsf_kernels.rcu`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from einops import rearrange
from torch import Tensor

_AXES = {2: "hw", 3: "dhw"}
# Token order of the original MAE: inside a token the voxel is slow and the channel fast.
_PATTERNS = {
    4: "b c (gh ph) (gw pw) -> b (gh gw) (ph pw c)",
    5: "b c (gd pd) (gh ph) (gw pw) -> b (gd gh gw) (pd ph pw c)",
}


def patchify(volume: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[B, C, *S] to tokens [B, L, P * C]."""
    sizes = {f"p{a}": p for a, p in zip(_AXES[volume.ndim - 2], patch_size, strict=True)}
    return rearrange(volume, _PATTERNS[volume.ndim], **sizes)


def unpatchify(tokens: Tensor, patch_size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Tokens [B, L, P * C] to [B, C, *S]; ``shape`` is [B, C, *S]."""
    left, right = _PATTERNS[len(shape)].split(" -> ")
    sizes = {}
    for axis, patch, size in zip(_AXES[len(shape) - 2], patch_size, shape[2:], strict=True):
        sizes[f"p{axis}"], sizes[f"g{axis}"] = patch, size // patch
    return rearrange(tokens, f"{right} -> {left}", b=shape[0], c=shape[1], **sizes)


@dataclass(frozen=True)
class Region:
    """A block of the volume in which all patches have the same size."""

    space: tuple[Any, ...]  # index of its voxels in a tensor [..., *S]
    grid: tuple[Any, ...]  # index of its patches in a tensor [..., *G]
    counts: tuple[int, ...]  # patches per axis
    patch: tuple[int, ...]  # voxels per axis

    def windows(self, volume: Tensor) -> Tensor:
        """[B, n, *S] to [B * patches, P, n]."""
        grid, inner = self._names()
        block = volume[self.space]
        return rearrange(block, f"b n {grid} -> (b {self._outer()}) ({inner}) n", **self._sizes())

    def put(self, windows: Tensor, volume: Tensor) -> None:
        """Write [B * patches, P, n] to this block of ``volume`` [B, n, *S]."""
        grid, inner = self._names()
        volume[self.space] = rearrange(
            windows, f"(b {self._outer()}) ({inner}) n -> b n {grid}", **self._sizes()
        )

    def _names(self) -> tuple[str, str]:
        axes = _AXES[len(self.patch)]
        return " ".join(f"(g{a} p{a})" for a in axes), " ".join(f"p{a}" for a in axes)

    def _outer(self) -> str:
        return " ".join(f"g{a}" for a in _AXES[len(self.patch)])

    def _sizes(self) -> dict[str, int]:
        axes = _AXES[len(self.patch)]
        sizes = {f"p{a}": p for a, p in zip(axes, self.patch, strict=True)}
        return sizes | {f"g{a}": g for a, g in zip(axes, self.counts, strict=True)}


def regions(space: Sequence[int], patch_size: Sequence[int]) -> Iterator[Region]:
    """The regions of a volume of size ``space``: the bulk, then the edges with smaller patches."""
    per_axis = []
    for size, patch in zip(space, patch_size, strict=True):
        whole = size // patch
        blocks = [(slice(0, whole * patch), slice(0, whole), whole, patch)]
        if size % patch:
            blocks.append((slice(whole * patch, size), slice(whole, whole + 1), 1, size % patch))
        per_axis.append(blocks)
    for combination in product(*per_axis):
        voxels, patches, counts, patch = zip(*combination, strict=True)
        yield Region((..., *voxels), (..., *patches), counts, patch)

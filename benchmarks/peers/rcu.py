# SPDX-License-Identifier: Apache-2.0
"""rcu in textbook form: queries, keys and values are made, then some attention takes them.

The weights are those of the same ``nn.RCU``, not absorbed, in the dtype of the data, as a region of
autocast would have them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import Case, Inputs
from benchmarks.peers import Peer, Runner
from grcsf_kernels.nn import RCU

# Takes queries, keys and values [n, h, P, d] of n patches.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def windows(volume: Tensor, patch: list[int]) -> Tensor:
    """[B, C, *S] to [B * patches, P, C]; the patch divides S."""
    axes = volume.ndim - 2
    shape = list(volume.shape[:2])
    for size, step in zip(volume.shape[2:], patch, strict=True):
        shape += [size // step, step]
    outer, inner = [range(first, 2 + 2 * axes, 2) for first in (2, 3)]
    ordered = volume.reshape(shape).permute(0, *outer, *inner, 1)
    return ordered.flatten(0, axes).flatten(1, axes)


def volume_of(tokens: Tensor, patch: list[int], shape: torch.Size) -> Tensor:
    """The inverse of :func:`windows`."""
    axes = len(shape) - 2
    grid = [size // step for size, step in zip(shape[2:], patch, strict=True)]
    split = tokens.reshape(shape[0], *grid, *patch, shape[1])
    order = [0, 1 + 2 * axes]
    for axis in range(axes):
        order += [1 + axis, 1 + axes + axis]
    return split.permute(order).reshape(shape)


def textbook(x: Tensor, residual: Tensor, unit: RCU, patch: list[int], attend: Attention) -> Tensor:
    """``out`` of rcu; ``residual`` [B, K, c, *S]."""
    own, maps = windows(x, patch), windows(residual.flatten(1, 2), patch)

    def linear(layer: Any, values: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(values.dtype)
        return F.linear(values, layer.weight.to(values.dtype), bias)

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(2, (unit.num_heads, unit.head_dim)).transpose(1, 2)

    means = torch.cat([own.mean(dim=1), maps.mean(dim=1)], dim=1)
    scores = torch.sigmoid(linear(unit.score_output, linear(unit.score_hidden, means).relu()))
    added = torch.zeros_like(own)
    for index, keys in enumerate(maps.split(unit.map_channels, dim=2)):
        attended = attend(
            heads(linear(unit.query[index], own)),
            heads(linear(unit.key[index], keys)),
            heads(linear(unit.value[index], keys)),
        )
        y = linear(unit.output[index], attended.transpose(1, 2).flatten(2))
        added = added + unit.map_weight[index].to(x.dtype) * y
    return volume_of(own + scores[:, None] * added, patch, x.shape)


def _peer(
    attention: Callable[[Case], Attention],
    why_not: Callable[[Case, str, bool], str],
    compiled: bool = False,
) -> Peer:
    def make(case: Case, inputs: Inputs, backward: bool) -> Runner:
        unit, (x, residual) = inputs.unit, inputs.arguments[:2]
        assert unit is not None
        unit.requires_grad_(backward)
        steps = inputs.options["patch_size"] or case.space
        patch = [min(step, size) for step, size in zip(steps, case.space, strict=True)]
        function: Callable[..., Any] = textbook
        if compiled:
            torch.compiler.reset()
            function = torch.compile(textbook, dynamic=False)
        attend = attention(case)
        leaves = {"x": x.requires_grad_(backward)}
        leaves |= {f"unit.{name}": value for name, value in unit.named_parameters()}
        return Runner(lambda: (function(x, residual, unit, patch, attend),), leaves, inputs.grads)

    return Peer(make, why_not, lambda case: 2 if case.patch is None else 1)


def _matrix(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with its matrix, voxel by voxel."""
    scale = queries.shape[-1] ** -0.5
    return torch.softmax(queries @ keys.mT * scale, dim=-1) @ values


def _flex(case: Case) -> Attention:
    """FlexAttention, one patch after the other as for SDPA: no mask has to be built."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def call(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width = queries.shape[-1]
        # On CUDA a head has at least 16 channels; zeros change nothing but the time.
        missing = max(0, 16 - width) if queries.is_cuda else 0
        padded = (F.pad(tensor, (0, missing)) for tensor in (queries, keys, values))
        return attend(*padded, scale=width**-0.5)[..., :width]

    return call


def _natten(case: Case) -> Attention:
    """NATTEN with stride = kernel size, which is attention inside the patches of the volume."""
    natten = importlib.import_module("natten")
    axes = len(case.space)
    function = natten.na3d if axes == 3 else natten.na2d
    size = (case.patch or 1,) * axes

    def call(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, width = queries.shape[1], queries.shape[3]
        shape = torch.Size([1, heads * width, *case.space])

        def whole(tensor: Tensor) -> Tensor:
            tokens = tensor.transpose(1, 2).flatten(2)
            return volume_of(tokens, list(size), shape).movedim(1, -1).unflatten(-1, (heads, width))

        out = function(whole(queries), whole(keys), whole(values), kernel_size=size, stride=size)
        back = windows(out.flatten(-2).movedim(-1, 1), list(size))
        return back.unflatten(2, (heads, width)).transpose(1, 2)

    return call


def _only_windows(case: Case, device: str, backward: bool) -> str:
    return "there is one window, the volume" if case.family == "global" else ""


def _flex_why_not(case: Case, device: str, backward: bool) -> str:
    if device == "cpu" and backward:
        return "FlexAttention has no backward on CPU"
    if device == "cpu" and case.dtype != "float32":
        return "measured in float32 only"
    return _only_windows(case, device, backward)


def _natten_why_not(case: Case, device: str, backward: bool) -> str:
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    if device != "cuda" or case.dtype == "float32":
        return "NATTEN's fused kernels are for CUDA, in half precision"
    return _only_windows(case, device, backward)


def _only_main(case: Case, device: str, backward: bool) -> str:
    if not case.quick:
        return "measured for the main case only"
    return _only_windows(case, device, backward)


def _matrix_why_not(case: Case, device: str, backward: bool) -> str:
    return "" if case.family == "global" else "for global attention only"


def _sdpa(case: Case) -> Attention:
    return F.scaled_dot_product_attention


PEERS = {
    "sdpa": _peer(_sdpa, lambda case, device, backward: ""),
    "sdpa + compile": _peer(_sdpa, _only_main, compiled=True),
    "flex": _peer(_flex, _flex_why_not),
    "natten": _peer(_natten, _natten_why_not),
    "matrix": _peer(lambda case: _matrix, _matrix_why_not),
}

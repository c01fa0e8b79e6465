# SPDX-License-Identifier: Apache-2.0
"""Weights of eager attention and gates, copied into the units.

Attention that one writes in PyTorch keeps its projections as linear layers, as convolutions of one
voxel, as one combined layer or in ``nn.MultiheadAttention``. All of them are the matrices that
:class:`grcsf_kernels.nn.RCU` has, so the unit computes the same; what differs is rounding.

A bias of the keys is not copied: it adds the same number to every logit of a query, which the
softmax takes out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from grcsf_kernels.nn.layers import affine, is_plain
from grcsf_kernels.nn.rcu import RCU
from grcsf_kernels.nn.squeeze_excitation import SqueezeExcitation

#: A linear layer, a convolution of one voxel, or its weight [out, in] and bias [out] (None: zero).
Projection: TypeAlias = "nn.Module | tuple[Tensor, Tensor | None]"

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _matrix(projection: Projection, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a projection."""
    if isinstance(projection, tuple):
        weight, bias = projection
    elif isinstance(projection, nn.Linear) and not is_plain(projection):
        # Its weight is what the last call left there: the layer says what it computes now.
        with torch.no_grad():
            like = next(projection.parameters(), torch.empty(0))
            weight, bias = affine(name, projection, projection.in_features, like)
    elif isinstance(projection, _LAYERS):
        weight, bias = projection.weight, projection.bias
        if getattr(projection, "groups", 1) != 1:
            raise ValueError(f"{name} is a convolution of {projection.groups} groups, expected 1")
    else:
        raise ValueError(
            f"{name} is a {type(projection).__name__}, expected Linear, Conv1d, Conv2d, Conv3d or "
            "(weight, bias)"
        )
    if weight.ndim < 2 or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(f"{name} has a weight {tuple(weight.shape)}, expected [out, in, 1, ...]")
    weight = weight.detach().flatten(1)
    return weight, None if bias is None else bias.detach()


def _require_plain(name: str, layer: nn.Module) -> None:
    if not is_plain(layer) or is_parametrized(layer):
        raise ValueError(
            f"{name} of the unit has an adapter, a parametrization or hooks, expected a plain "
            "nn.Linear: copy the weights before these are added"
        )


def split_projection(projection: Projection, parts: int = 3) -> list[tuple[Tensor, Tensor | None]]:
    """The projections that one combined layer holds, one block of rows after the other.

    Args:
        projection: the combined layer: query, key and value (``parts=3``, where image and map have
            the same channels), or key and value (``parts=2``). Each block of rows is one projection
            with all its heads; heads that alternate between query, key and value are another order.
        parts: how many.

    Returns:
        (weight, bias) of each, as :func:`load_projections` takes them.

    Raises:
        ValueError: rows that ``parts`` does not divide.
    """
    weight, bias = _matrix(projection, "split_projection: projection")
    if weight.shape[0] % parts:
        raise ValueError(
            f"split_projection: projection has {weight.shape[0]} rows, "
            f"expected a multiple of {parts}"
        )
    biases = [None] * parts if bias is None else bias.chunk(parts)
    return list(zip(weight.chunk(parts), biases, strict=True))


@torch.no_grad()
def load_projections(
    unit: RCU,
    index: int,
    *,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection | None = None,
    scale: float | None = None,
) -> None:
    """Copy the attention of one residual map into a unit.

    Args:
        unit: takes the weights; its ``map_weight`` and scoring network stay as they are.
        index: which residual map.
        query: from the ``channels`` of the features to ``num_heads * head_dim``, head after head.
        key: from ``map_channels`` to the same; its bias is not copied (see the module).
        value: from ``map_channels`` to the same.
        output: back to ``channels``; None: there is none, ``num_heads * head_dim`` is ``channels``.
        scale: what the products of queries and keys are multiplied by; None: 1 / sqrt(head_dim).

    Raises:
        ValueError: shapes that are not those of the unit, or an index that it does not have.
    """
    if index not in range(unit.num_maps):
        raise ValueError(
            f"load_projections: index is {index}, expected a map from 0 to {unit.num_maps - 1}"
        )
    width = unit.num_heads * unit.head_dim
    if output is None:
        output = (torch.eye(width, dtype=unit.map_weight.dtype), None)
    factor = 1.0 if scale is None else scale * unit.head_dim**0.5
    sources = {"query": query, "key": key, "value": value, "output": output}
    found = {name: _matrix(p, f"load_projections: {name}") for name, p in sources.items()}
    # All shapes first, so that an error leaves the unit as it was.
    for name, (weight, bias) in found.items():
        _require_plain(f"load_projections: {name}.{index}", getattr(unit, name)[index])
        expected = tuple(getattr(unit, name)[index].weight.shape)
        if tuple(weight.shape) != expected or (bias is not None and bias.shape != expected[:1]):
            raise ValueError(
                f"load_projections: {name} has a weight {tuple(weight.shape)} and a bias "
                f"{None if bias is None else tuple(bias.shape)}, expected {expected} and "
                f"{expected[:1]} or none"
            )
    for name, (weight, bias) in found.items():
        layer, by = getattr(unit, name)[index], factor if name == "query" else 1.0
        layer.weight.copy_(weight * by)
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias * by)


def load_attention(unit: RCU, index: int, attention: nn.MultiheadAttention) -> None:
    """Copy ``nn.MultiheadAttention`` from features to one residual map into a unit.

    That is a module whose queries are the features and whose keys and values are the map:
    ``nn.MultiheadAttention(channels, num_heads, kdim=map_channels, vdim=map_channels)``, or without
    ``kdim`` and ``vdim`` where both have the same channels. It fits a unit whose ``num_heads *
    head_dim`` is ``channels``.

    Args:
        unit: takes the weights.
        index: which residual map.
        attention: whose weights.

    Raises:
        ValueError: shapes that are not those of the unit, or attention that the unit does not have
            (``add_bias_kv``, ``add_zero_attn``, dropout).
    """
    if attention.bias_k is not None or attention.add_zero_attn or attention.dropout:
        raise ValueError(
            "load_attention: attention has add_bias_kv, add_zero_attn or dropout, expected none"
        )
    if attention.num_heads != unit.num_heads:
        raise ValueError(
            f"load_attention: attention has {attention.num_heads} heads, expected {unit.num_heads}"
        )
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    bias = attention.in_proj_bias
    biases = [None] * 3 if bias is None else bias.chunk(3)
    query, key, value = zip(weights, biases, strict=True)
    load_projections(unit, index, query=query, key=key, value=value, output=attention.out_proj)


@torch.no_grad()
def load_gate(gate: SqueezeExcitation, layers: nn.Module | Sequence[nn.Module]) -> None:
    """Copy a squeeze-and-excitation gate.

    Args:
        gate: takes the weights, ``gcu.skip_gate`` say; its hidden units are ``channels //
            reduction``.
        layers: MONAI's ``ChannelSELayer``, or the two layers (linear, or convolutions of one
            voxel) around a ReLU, with or without the activations: (squeeze, ReLU, excite, Sigmoid).

    Raises:
        ValueError: other layers, activations or shapes.
    """
    if getattr(layers, "add_residual", False):
        raise ValueError("load_gate: layers adds its input to its output, expected a gate alone")
    sequence: Any = getattr(layers, "fc", layers)
    parts = list(sequence)
    pair = [part for part in parts if isinstance(part, _LAYERS)]
    between = [type(part) for part in parts if not isinstance(part, _LAYERS)]
    if len(pair) != 2 or between not in ([], [nn.ReLU], [nn.ReLU, nn.Sigmoid]):
        names = [type(part).__name__ for part in parts]
        raise ValueError(
            f"load_gate: layers is {names}, expected two layers around a ReLU, then a Sigmoid"
        )
    found = [
        (layer, *_matrix(source, f"load_gate: {name}"))
        for name, layer, source in zip(
            ("squeeze", "excite"), (gate.squeeze, gate.excite), pair, strict=True
        )
    ]
    for layer, weight, _ in found:
        _require_plain("load_gate: a layer", layer)
        if weight.shape != layer.weight.shape:
            raise ValueError(
                f"load_gate: layers has a weight {tuple(weight.shape)}, expected "
                f"{tuple(layer.weight.shape)} (channels and reduction of the gate)"
            )
    for layer, weight, bias in found:
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)

# SPDX-License-Identifier: Apache-2.0
"""What the linear layers of a unit compute, whatever was done to them.

Adapters (LoRA), pruning, weight and spectral normalization, quantization and hooks change what a
layer computes without changing ``layer.weight``, or change it in the layer's call. So a layer that
is more than a plain ``nn.Linear`` is called.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

# How far a layer may be from affine: rounding, by the dtype in which it computes.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class OpenLinear(nn.Linear):
    """A linear layer that begins with biases of 1, so that every rectified unit is on.

    A layer of its own, so that it begins so whatever resets it, before or after its parent.
    """

    def reset_parameters(self) -> None:
        """The weights as torch has them, the biases 1."""
        super().reset_parameters()
        nn.init.ones_(self.bias)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer's ``weight`` and ``bias`` say all it does; also with parametrizations."""
    return type(layer).forward is nn.Linear.forward and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` in the dtype of ``x``, also where the layer has another one."""
    if is_plain(layer):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)
    return layer(x.to(_dtype(layer, x))).to(x.dtype)


def affine(name: str, layer: nn.Module, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, features] and bias [out] of a layer in the dtype of ``like``, differentiable.

    A layer that is not plain is called once, on the unit vectors and on 0: what it does to its
    weights counts, and gradients flow to its parameters.

    Args:
        name: of the layer, for errors.
        layer: an affine function of its input.
        features: of the input.
        like: gives the dtype, and the device for a layer without parameters.

    Raises:
        RuntimeError: the layer is not affine: dropout in training, a hook on activations. Under
            ``torch.compile`` dropout alone is found.
        TypeError: the layer takes quantized tensors only, or gives no tensor [N, out].
    """
    if is_plain(layer):
        weight: Tensor = layer.weight.to(like.dtype)
        bias: Tensor | None = layer.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.to(like.dtype)
    for part in layer.modules():
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise RuntimeError(
                f"{name} has dropout (p={part.p}) in training, which can't be absorbed into the "
                "operator's weights: set it to 0 (lora_dropout=0)"
            )
    if type(layer).__module__.startswith("torch.ao.nn.quantized.modules"):
        raise TypeError(
            f"{name} is a {type(layer).__name__} of torch.ao.nn.quantized, which takes quantized "
            "tensors: leave the layer in floating point, or use quantize_dynamic"
        )
    dtype = _dtype(layer, like)
    device = next((p.device for p in layer.parameters()), like.device)
    points = torch.eye(features, dtype=dtype, device=device)
    points = torch.cat([points, points.new_zeros(1, features)])
    # Quantized activations have the range of all their rows: that of 0 and 1 alone is exact.
    quantized = ".quantized." in type(layer).__module__
    checked = not quantized and not torch.compiler.is_compiling() and type(points) is Tensor
    if checked:
        probe = torch.linspace(-2, 3, features, dtype=dtype, device=device)
        points = torch.cat([points, probe[None], probe[None]])
    found = layer(points)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != len(points):
        what = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(f"{name} gives {what} for [{len(points)}, {features}], expected a tensor")
    found = found.to(like.dtype)
    bias = found[features]
    weight = (found[:features] - bias).mT
    if checked:
        _check_affine(name, weight, bias, probe.to(like.dtype), found[features + 1 :], dtype)
    return weight, bias


@torch.no_grad()
def _check_affine(
    name: str, weight: Tensor, bias: Tensor, probe: Tensor, found: Tensor, dtype: torch.dtype
) -> None:
    scale = weight.abs() @ probe.abs() + bias.abs()
    error = (found - (weight @ probe + bias)).abs()
    if weight.device.type == "meta" or bool((error <= _ROUNDING[dtype] * scale.max()).all()):
        return
    if not bool(torch.isfinite(found).all()):
        return  # NaN weights: what is made of them says so
    raise RuntimeError(
        f"{name} is not affine in its input (a hook that changes activations, or something random "
        "in it?), so it can't be absorbed into the operator's weights"
    )


def _dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The floating dtype of the layer's parameters; that of ``x`` (float32) without any."""
    floating = (p.dtype for p in layer.parameters() if p.is_floating_point())
    return next(floating, x.dtype if is_plain(layer) else torch.float32)

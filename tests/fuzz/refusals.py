# SPDX-License-Identifier: Apache-2.0
"""Random wrong calls: each has to be refused by an error that names the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fuzz.arguments import Maker
from support import function
from torch import Tensor

REFUSALS = (TypeError, ValueError)


def _changed(maker: Maker, tensor: Tensor) -> Any:
    """The tensor, changed so that it is wrong whatever it stands for."""
    choices: list[Any] = [
        lambda: tensor.new_zeros((*tensor.shape, 1)),
        lambda: tensor.new_zeros((3, *tensor.shape)),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.complex64),
        lambda: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
        lambda: torch.zeros(tensor.shape, dtype=tensor.dtype).to_sparse(),
    ]
    if tensor.ndim:
        axis = maker.random.randrange(tensor.ndim)
        longer = list(tensor.shape)
        longer[axis] += 1 + maker.random.randrange(3)
        choices += [lambda: tensor.new_zeros(longer)] * 3
        choices.append(lambda: tensor.flatten())
    return maker.random.choice(choices)()


def _wrong_option(maker: Maker, name: str, value: Any) -> Any:
    if name == "patch_size":
        axes = 3 if value is None else len(value)
        return maker.random.choice(
            ([0] * axes, [-1] * axes, [2] * (axes + 1), [-(2**62)] * axes, [2] * (axes + 2))
        )
    if name == "eps":
        return maker.random.choice((0.0, -1.0, math.nan, math.inf))
    return "median"


def _acceptable(name: str, changed: Tensor, original: Tensor, hidden: Tensor | None) -> bool:
    """Whether the change left the call right."""
    if changed.is_sparse or (changed.dtype, changed.device) != (original.dtype, original.device):
        return False
    if changed.shape == original.shape:
        return True
    if changed.ndim != original.ndim:
        return False
    if name == "prediction":  # any number of draws
        return hidden is None and changed.shape[1:] == original.shape[1:]
    # Features of any size can be interpolated to any other.
    return name in ("skip", "deep") and changed.shape[:2] == original.shape[:2]


def _backward_arguments(operator: str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """Of the backward operator: its tensors, its options, and which gradients it gives."""
    outputs = function(operator)(*arguments, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    grads = [torch.ones_like(output) for output in outputs]
    tensors = list(arguments)
    if operator == "rcu":
        if tensors[1].ndim == tensors[0].ndim:
            tensors[1] = tensors[1].unsqueeze(2)
        values: list[Any] = [options["patch_size"]]
        grads.append(outputs[1].detach())
    elif operator == "gcu":
        values = [options["compensation"], options["eps"]]
    else:
        values = [options[n] for n in ("patch_size", "normalized_target", "average", "eps")]
    needs = [isinstance(t, Tensor) and t.is_floating_point() for t in tensors]
    if operator == "residual_map":
        needs = needs[:2]
    return [*grads, *tensors], values, needs


def check_refusal(maker: Maker) -> str:
    """One wrong call of an operator or of its backward.

    Raises:
        AssertionError: it was not refused, or by another error.
    """
    call = maker.call()
    arguments, options = list(call.arguments), dict(call.options)
    backward = maker.random.random() < 0.5
    tensors, values, needs = _backward_arguments(call.operator, arguments, options)
    if not backward:
        tensors = arguments
    position = maker.random.randrange(len(tensors) + len(options))
    what = ""
    if position < len(tensors):
        original = tensors[position]
        if original is None:
            return f"refusal of {call.operator} (nothing to change)"
        changed = _changed(maker, original)
        own = position - (len(tensors) - len(arguments))
        # Of a backward the gradients fix all sizes of skip.
        name = call.names[own] if own >= 0 and not (backward and own == 0) else ""
        hidden = arguments[-1] if call.operator == "residual_map" else None
        if _acceptable(name, changed, original, hidden):
            return f"refusal of {call.operator} (nothing to change)"
        tensors = list(tensors)
        tensors[position] = changed
        what = f"tensor {position} is {changed.dtype} {tuple(changed.shape)} {changed.device}"
        what += f", was {original.dtype} {tuple(original.shape)}"
    elif backward and maker.random.random() < 0.3:
        needs = [*needs, True] if maker.random.random() < 0.5 else needs[:-1]
        what = f"needs has {len(needs)} values"
    else:
        names = [n for n in options if n != "normalized_target"]
        if not names:
            return f"refusal of {call.operator} (nothing to change)"
        name = maker.random.choice(names)
        wrong = _wrong_option(maker, name, options[name])
        if name == "patch_size" and len(wrong) == tensors[0].ndim - 2 and min(wrong) > 0:
            wrong = [0] * len(wrong)
        options[name] = wrong
        what = f"{name} is {wrong}"
        order = {"gcu": ("compensation", "eps"), "rcu": ("patch_size",)}.get(
            call.operator, ("patch_size", "normalized_target", "average", "eps")
        )
        values = [options[n] for n in order]
    suffix = "_backward" if backward else ""
    try:
        if backward:
            getattr(torch.ops.grcsf, f"{call.operator}_backward")(*tensors, *values, needs)
        else:
            function(call.operator)(*tensors, **options)
    except REFUSALS as refusal:
        assert call.operator in str(refusal), f"{call.operator}{suffix}: {what}: {refusal}"
    except Exception as other:
        raise AssertionError(
            f"{call.operator}{suffix}: {what}: refused by {type(other).__name__}: {other}"
        ) from other
    else:
        raise AssertionError(f"{call.operator}{suffix}: {what}: was not refused")
    return f"refusal of {call.operator}{suffix}"

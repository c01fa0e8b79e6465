# SPDX-License-Identifier: Apache-2.0
"""The calls whose Triton launches are collected: every kernel, dtype, layout and row of the tables.

The tensors are on meta: nothing is computed, and no size costs anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import work
from benchmarks.harness.cases import Case, make_inputs
from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.triton import launch

MAIN = "main"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Call:
    """Forward and backward of an operator.

    Attributes:
        case: sizes, dtype and layout. ``family`` says what is special, ``main`` for nothing.
        prediction: dtype of residual_map's prediction; empty: the image's.
        draws: of residual_map.
        options: of residual_map (``normalized_target``, ``average``, ``hidden``), of gcu
            (``deep``: size of the deep tensor, ``compensation``) and of rcu (``residual``: whether
            its gradient is asked for).
    """

    case: Case
    prediction: str = ""
    draws: int = 4
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """As one reads it."""
        words = [self.case.family, self.case.title]
        return " ".join([*words, f"prediction {self.prediction}"] if self.prediction else words)

    def option(self, name: str, default: Any) -> Any:
        """An option, or its default."""
        return dict(self.options).get(name, default)

    def run(self, module: ModuleType, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Outputs and gradients of ``forward`` and ``backward`` of a backend's module."""
        options = _OPTIONS[self.case.subject](self)
        outputs = module.forward(*tensors, *options)
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        given, needs = found, [True] * len(tensors)
        if self.case.subject == "residual_map":
            needs = [True, True]
        elif self.case.subject == "rcu":
            given = (*found, found[1])  # the backward takes the scores too
            needs[1] = self.option("residual", False)
        return (*found, *module.backward(*given, *tensors, *options, needs))

    def tensors(self, device: str) -> list[Any]:
        """Random arguments, dense as a backend gets them; without data on ``meta``."""
        return _TENSORS[self.case.subject](self, device)

    def record(self, architecture: int) -> launch.Recording:
        """The launches of forward and backward on this architecture."""
        module = importlib.import_module(f"grcsf_kernels.triton.{self.case.subject}")
        with launch.recording(architecture) as recorded:
            self.run(module, self.tensors("meta"))
        return recorded

    def bytes(self) -> tuple[int, int]:
        """The least that forward, and forward with backward, have to move."""
        tensors = self.tensors("meta")
        if self.case.subject == "residual_map":
            image, prediction, hidden = tensors
            read = image.nbytes + prediction.nbytes + (0 if hidden is None else hidden.nbytes)
            forward = read + image.nbytes
            return forward, forward + read + 2 * image.nbytes + prediction.nbytes
        of_operator = getattr(work, self.case.subject)
        forward, both = (
            of_operator(*tensors, backward=backward, patch_size=None).bytes
            for backward in (False, True)
        )
        return forward, both


def _random(call: Call, device: str, *shape: int, dtype: str = "") -> Tensor:
    tensor = torch.randn(shape, device=device).to(getattr(torch, dtype or call.case.dtype))
    if call.case.layout == "contiguous":
        return tensor
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=last)


def _weight_dtype(call: Call) -> torch.dtype:
    return compute_dtype(getattr(torch, call.case.dtype))


def _residual_map_tensors(call: Call, device: str) -> list[Any]:
    case = call.case
    tokens = prod(size // own for size, own in zip(case.space, _patch(case), strict=True))
    shape = (call.draws, 1, tokens, prod(_patch(case)) * case.channels)
    dtype = getattr(torch, call.prediction or case.dtype)
    hidden = None
    if call.option("hidden", True):
        hidden = torch.rand(shape[:3], device=device) < 0.75
    image = _random(call, device, 1, case.channels, *case.space)
    return [image, torch.randn(shape, device=device).to(dtype), hidden]


def _gcu_tensors(call: Call, device: str) -> list[Any]:
    case = call.case
    size = call.option("deep", [max(1, size // 2) for size in case.space])
    deep = _random(call, device, 1, case.channels, *size)
    gates = torch.rand((2, 1, case.channels), dtype=_weight_dtype(call), device=device)
    return [_random(call, device, 1, case.channels, *case.space), deep, gates[0], gates[1]]


def _rcu_tensors(call: Call, device: str) -> list[Any]:
    case = call.case
    # The weights, which do not depend on the volume, are made on the CPU: meta knows no autocast.
    small = make_inputs(replace(case, space=(2,) * len(case.space), dtype="float32"), "cpu", 0)
    weights = [weight.to(device, _weight_dtype(call)) for weight in small.arguments[2:]]
    maps, _, map_channels, _ = weights[0].shape
    residual = torch.rand((1, maps, map_channels, *case.space), device=device)
    x = _random(call, device, 1, case.channels, *case.space)
    return [x, residual.to(x.dtype), *weights]


_TENSORS = {"residual_map": _residual_map_tensors, "gcu": _gcu_tensors, "rcu": _rcu_tensors}


def _patch(case: Case) -> list[int]:
    if case.patch is None:
        return list(case.space)
    return [min(case.patch, size) for size in case.space]


_OPTIONS: dict[str, Callable[[Call], tuple[Any, ...]]] = {
    "residual_map": lambda call: (
        _patch(call.case),
        call.option("normalized_target", True),
        call.option("average", "residuals"),
        1e-6,
    ),
    "gcu": lambda call: (call.option("compensation", "dissimilarity"), 1e-6),
    "rcu": lambda call: (_patch(call.case),),
}


def _residual_map_calls(case: Case) -> Iterator[Call]:
    """Of one dtype and layout."""
    case = replace(case, channels=1 if case.layout == "contiguous" else 4, patch=16)
    yield Call(case)
    if case.dtype == "float16":
        return
    yield Call(replace(case, family="plain"), options=(("normalized_target", False),))
    if case.layout != "contiguous":
        return
    if case.dtype == "float32":
        yield Call(replace(case, family="mixed"), prediction="bfloat16")
    averages = (("average", "reconstructions"),)
    yield Call(replace(case, family="reconstructions"), options=averages)
    yield Call(replace(case, family="one draw"), draws=1, options=(("hidden", False),))
    yield Call(replace(case, family="4 channels", channels=4))
    yield Call(replace(case, family="3 channels", channels=3))
    yield Call(replace(case, family="small patches", patch=4))
    yield Call(replace(case, family="2D", space=(512, 512)))


def _gcu_calls(case: Case) -> Iterator[Call]:
    yield Call(case)
    if case.dtype == "float16" or case.layout != "contiguous":
        return
    similarity = (("compensation", "similarity"),)
    yield Call(replace(case, family="similarity", space=(64,) * 3), options=similarity)
    yield Call(replace(case, family="first level", channels=16))
    yield Call(replace(case, family="deepest level", space=(8,) * 3, channels=256))
    odd = (("deep", (7, 9, 5)),)
    yield Call(replace(case, family="odd sizes", space=(13, 18, 10), channels=24), options=odd)
    whole = (("deep", (99, 117, 95)),)
    yield Call(replace(case, family="whole volume", space=(197, 233, 189)), options=whole)
    yield Call(replace(case, family="2D", space=(512, 512)))


def _rcu_calls(case: Case) -> Iterator[Call]:
    yield Call(case)
    if case.dtype == "float16":
        return
    yield Call(replace(case, family="large patches", patch=32))
    if case.layout != "contiguous":
        return
    yield Call(replace(case, family="first level", channels=16))
    yield Call(replace(case, family="deepest level", space=(8,) * 3, channels=256))
    yield Call(replace(case, family="edge patches", space=(101, 67, 45), channels=24))
    yield Call(replace(case, family="2D", space=(512, 512)))
    yield Call(replace(case, family="map's gradient"), options=(("residual", True),))
    yield Call(
        replace(case, family="map's gradient, large patches", patch=32),
        options=(("residual", True),),
    )
    yield Call(replace(case, family="global", space=(64,) * 3, patch=None))
    for channels in (2, 32, 64):
        family = f"{channels} map channels"
        yield Call(
            replace(case, family=family, space=(48,) * 3, map_channels=channels),
            options=(("residual", True),),
        )


_CALLS = {"residual_map": _residual_map_calls, "gcu": _gcu_calls, "rcu": _rcu_calls}


def calls(operator: str, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Call]:
    """Every call of an operator."""
    for dtype in dtypes:
        for layout in ("contiguous", "channels_last"):
            case = Case(operator, MAIN, (128, 128, 128), 32, dtype, layout)
            yield from _CALLS[operator](case)

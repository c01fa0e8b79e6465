# SPDX-License-Identifier: Apache-2.0
"""The cases that are measured: shapes, dtypes and layouts, and the random tensors of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels import RCUWeights
from grcsf_kernels.nn import RCU

DRAWS, MAE_PATCH, MAPS, HEADS = 4, 16, 2, 4
# A trained unit attends: (range of a) * (range of r) is near 9, where a fresh one has about 2.
_TRAINED = 4.0

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """One thing that is measured.

    Attributes:
        subject: the operator, module or task.
        family: cases that differ in one thing: ``size``, ``level`` (those of a U-shaped network on
            128³), ``dtype``, ``layout``, ``image`` (2D), ``global`` and ``scaling``.
        space: voxels per axis.
        channels: C.
        dtype: of the data.
        layout: ``contiguous`` or ``channels_last``.
        patch: patch size of rcu; None: global attention.
        map_channels: c of rcu.
        quick: part of ``--quick``.
        directions: forward (False), forward + backward (True).
    """

    subject: str
    family: str
    space: tuple[int, ...]
    channels: int = 32
    dtype: str = "float32"
    layout: str = "contiguous"
    patch: int | None = 8
    map_channels: int = 1
    quick: bool = False
    directions: tuple[bool, ...] = (False, True)

    @property
    def voxels(self) -> int:
        """V."""
        return prod(self.space)

    @property
    def title(self) -> str:
        """The shape as one reads it: ``96³ C=32 float32``."""
        shape = "x".join(map(str, self.space))
        if len(set(self.space)) == 1:
            shape = f"{self.space[0]}{'²³'[len(self.space) - 2]}"
        words = [shape, f"C={self.channels}", self.dtype]
        if self.layout != "contiguous":
            words.append(self.layout)
        if self.map_channels != 1:
            words.append(f"c={self.map_channels}")
        if self.patch is None:
            words.append("global")
        return " ".join(words)

    def __str__(self) -> str:
        """The identifier in names of tests, of what ``-k`` takes."""
        _, *words = self.title.split()
        shape = "x".join(map(str, self.space))
        return (
            "-".join([self.subject, self.family, shape, *words]).replace(" ", "-").replace("=", "")
        )


@dataclass
class Inputs:
    """The tensors of one call.

    Attributes:
        arguments: in the order of the operator.
        options: keyword arguments.
        leaves: names and positions of the arguments that get a gradient.
        unit: of rcu, the module that the weights were absorbed from.
        grads: gradients that reach the outputs.
    """

    arguments: list[Any]
    options: dict[str, Any]
    leaves: dict[str, int]
    unit: RCU | None = None
    grads: tuple[Tensor, ...] = ()


def all_cases(operator: str, device: str) -> list[Case]:
    """Every case of an operator, small before large within a family."""
    dtype, edge = ("bfloat16", 128) if device == "cuda" else ("float32", 96)
    # Windowed attention takes minutes on CPU at sizes where the other operators take a second.
    slow = operator == "rcu" and device == "cpu"
    quick, side, deepest = (64, 48, 64) if slow else (edge, edge, 128)
    channels = 1 if operator == "residual_map" else 32
    main = Case(operator, "size", (side,) * 3, channels, dtype)
    others = [name for name in ("float32", "bfloat16", "float16") if name != dtype]
    sizes = (64, 96, 128, 192)
    cases = [replace(main, space=(n,) * 3, quick=n == quick) for n in sizes]
    cases += [replace(main, family="dtype", dtype=name) for name in others]
    cases.append(replace(main, family="layout", layout="channels_last"))
    cases.append(replace(main, family="image", space=(512, 512)))
    if operator == "residual_map":
        return cases
    cases += [
        replace(main, family="level", space=(deepest >> level,) * 3, channels=16 << level)
        for level in reversed(range(5))
        if (deepest >> level, 16 << level) not in [(n, channels) for n in sizes]
    ]
    if operator == "rcu":
        cases += [
            replace(main, family="global", space=(n,) * 3, patch=None, quick=n == 16)
            for n in (16, 24, 32, 64, edge)
        ]
        cases.append(replace(main, family="map channels", space=(48,) * 3, map_channels=16))
    return cases


def scaling_cases(operator: str, device: str) -> list[Case]:
    """The same few channels up to 256³: how the cost grows."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    channels = 1 if operator == "residual_map" else 8
    # Windowed attention soon takes too long on CPU, so its line begins further down.
    smaller = (32, 48) if operator == "rcu" else ()
    return [
        Case(
            operator,
            "scaling",
            (size,) * 3,
            channels,
            dtype,
            quick=48 <= size <= 96,
            directions=(False,),
        )
        for size in (*smaller, 64, 96, 128, 192, 256)
    ]


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Random tensors of ``case``: normal features, residual maps in [0, 1]; none on ``meta``."""
    operator = case.subject
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if case.layout == "channels_last" and tensor.ndim in _LAST:
            tensor = tensor.contiguous(memory_format=_LAST[tensor.ndim])
        return tensor

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    shape = (1, case.channels, *case.space)
    if operator == "residual_map":
        tokens, values = 1, 1
        for size in case.space:
            tokens, values = tokens * (size // MAE_PATCH), values * MAE_PATCH
        prediction = normal(DRAWS, 1, tokens, values * case.channels, dtype=dtype)
        arguments = [normal(*shape), prediction, uniform(DRAWS, 1, tokens) < 0.75]
        options: dict[str, Any] = {"patch_size": MAE_PATCH, "normalized_target": True}
        return Inputs(arguments, options, {"image": 0, "prediction": 1}, None, (normal(*shape),))

    grads = normal(*shape, dtype=dtype)
    if operator == "gcu":
        small = [max(1, size // 2) for size in case.space]
        arguments = [
            normal(*shape, dtype=dtype),
            normal(1, case.channels, *small, dtype=dtype),
            uniform(1, case.channels),
            uniform(1, case.channels),
        ]
        leaves = {"skip": 0, "deep": 1, "skip_gate": 2, "deep_gate": 3}
        grads_map = normal(1, 1, *case.space, dtype=dtype)
        return Inputs(arguments, {}, leaves, None, (grads, grads_map))

    unit = _trained_unit(case, device)
    x = normal(*shape, dtype=dtype)
    residual = uniform(1, MAPS, case.map_channels, *case.space).to(dtype)
    with torch.no_grad():
        weights = [weight.contiguous() for weight in unit.absorbed(x)]
    leaves = {"x": 0} | {name: at for at, name in enumerate(RCUWeights._fields, start=2)}
    options = {"patch_size": None if case.patch is None else [case.patch] * len(case.space)}
    return Inputs([x, residual, *weights], options, leaves, unit, (grads,))


def _trained_unit(case: Case, device: str) -> RCU:
    """The same weights for every set of inputs of a case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unit = RCU(
            case.channels,
            MAPS,
            map_channels=case.map_channels,
            num_heads=HEADS,
            patch_size=case.patch,
        )
    with torch.no_grad():
        for layer in unit.query:
            layer.weight *= _TRAINED
            layer.bias *= _TRAINED
    return unit.to(device)

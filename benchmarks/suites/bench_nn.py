# SPDX-License-Identifier: Apache-2.0
"""The modules of ``grcsf_kernels.nn`` with their parameters, as one puts them into a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import Case
from benchmarks.harness.rows import BOUNDS, Absent, Row, Session, run_row, worst_error
from benchmarks.peers import Runner
from grcsf_kernels.dispatch import BACKENDS, why_not
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.nn import GCU, RCU, ResidualMaps, SqueezeExcitation

MODULES = ("SqueezeExcitation", "GCU", "RCU", "ResidualMaps")
OPERATORS = {"GCU": "gcu", "RCU": "rcu", "ResidualMaps": "residual_map"}


def cases(device: str) -> list[Case]:
    dtype, edge = ("bfloat16", 128) if device == "cuda" else ("float32", 96)
    found = []
    for module in MODULES:
        side = 48 if module == "RCU" and device == "cpu" else edge
        main = Case(module, "module", (side,) * 3, dtype=dtype, quick=True)
        if module == "ResidualMaps":
            found.append(replace(main, channels=1, space=(96,) * 3, directions=(False,)))
            continue
        deeper = replace(main, space=(side // 4,) * 3, channels=128, quick=False)
        found += [main, deeper]
    return found


def peers(case: Case) -> list[str]:
    """The backends, and the best of them inside a compiled graph."""
    if case.subject == "SqueezeExcitation":
        return ["reference", "compile"]  # plain PyTorch
    return [*BACKENDS, "compile"]


def _module(case: Case) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """The module, and the shapes of its inputs."""
    torch.manual_seed(0)
    shape = (1, case.channels, *case.space)
    maps = (1, 2, *case.space)
    deep = (1, 2 * case.channels, *(size // 2 for size in case.space))
    if case.subject == "SqueezeExcitation":
        return SqueezeExcitation(case.channels), [shape]
    if case.subject == "GCU":
        return GCU(case.channels, deep_channels=2 * case.channels), [shape, deep]
    if case.subject == "RCU":
        return RCU(case.channels, num_maps=2, patch_size=8), [shape, maps]
    return ResidualMaps([MaskedAutoencoder(), MaskedAutoencoder()]), [shape]


def _forward(case: Case, module: nn.Module, peer: str, device: str) -> Callable[..., Any]:
    if peer == "compile":
        torch.compiler.reset()
        module = torch.compile(module, dynamic=False)  # type: ignore[assignment]

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        dtype = getattr(torch, case.dtype)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            if case.subject == "ResidualMaps":
                return (module(*inputs, generator=torch.Generator().manual_seed(0)),)
            return (module(*inputs),)

    return call


def test_nn(session: Session, benchmark: Any, case: Case, backward: bool, peer: str) -> None:
    device, operator = session.device, OPERATORS.get(case.subject)
    if peer in BACKENDS and operator and (reason := why_not(peer, operator, device)):
        raise Absent(reason)
    if peer == "compile" and case.subject == "ResidualMaps":
        raise Absent("its masks are drawn on the host")

    def make(seed: int, peer: str = peer) -> Runner:
        module, shapes = _module(case)
        module.to(device)
        torch.manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        inputs[0].requires_grad_(backward)
        leaves = {"input": inputs[0]} | dict(module.named_parameters())
        call = _forward(case, module, peer, device)
        grad = torch.randn(1, case.channels, *case.space, device=device).to(dtype)
        if case.subject == "SqueezeExcitation":
            grad = torch.randn(1, case.channels, device=device)
        backend = peer if peer in BACKENDS and operator else ""
        return Runner(lambda: call(*inputs), leaves, (grad,), backend)

    def check(found: dict[str, Tensor]) -> float:
        exact = session.expected((case, backward), lambda: make(0, "reference").run(backward))
        return worst_error(found, exact, BOUNDS[case.dtype])

    run_row(session, benchmark, Row.of(case, backward, peer), make, check=check)

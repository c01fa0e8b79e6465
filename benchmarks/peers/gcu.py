# SPDX-License-Identifier: Apache-2.0
"""gcu as one would write it in PyTorch, its backward left to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import Case, Inputs
from benchmarks.peers import Peer, Runner, requires_grad

_MODES = {4: "bilinear", 5: "trilinear"}


def plain(skip: Tensor, deep: Tensor, skip_gate: Tensor, deep_gate: Tensor) -> tuple[Tensor, ...]:
    """The definition, line by line."""
    axes = [1] * (skip.ndim - 2)
    gated = skip.float() * skip_gate.view(*skip_gate.shape, *axes)
    up = F.interpolate(
        deep.float() * deep_gate.view(*deep_gate.shape, *axes),
        size=skip.shape[2:],
        mode=_MODES[skip.ndim],
        align_corners=False,
    )
    norms = gated.norm(dim=1, keepdim=True).clamp(min=1e-6)
    norms = norms * up.norm(dim=1, keepdim=True).clamp(min=1e-6)
    dissimilarity = 1 - (gated * up).sum(dim=1, keepdim=True) / norms
    compensated = skip * (1 + dissimilarity)
    return compensated.to(skip.dtype), dissimilarity.to(skip.dtype)


def _peer(compiled: bool) -> Peer:
    def make(case: Case, inputs: Inputs, backward: bool) -> Runner:
        function: Callable[..., Any] = plain
        if compiled:
            torch.compiler.reset()
            function = torch.compile(plain, dynamic=False)
        return Runner(
            lambda: function(*inputs.arguments), requires_grad(inputs, backward), inputs.grads
        )

    def why_not(case: Case, device: str, backward: bool) -> str:
        return "" if case.quick else "measured for the main case only"

    return Peer(make, why_not)


PEERS = {"autograd": _peer(False), "autograd + compile": _peer(True)}

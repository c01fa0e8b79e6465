# SPDX-License-Identifier: Apache-2.0
"""What the kernels are compared with: fair, idiomatic versions of the same computation.

A peer turns the tensors of a case into a ``Runner``. Whether a peer can run, or why not, is said by
one function, as for the backends of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import grcsf_kernels
from benchmarks.harness.cases import Case, Inputs
from grcsf_kernels.dispatch import BACKENDS, use_backend, why_not

# Global attention in quadratic time is measured up to this many voxels.
LARGEST_QUADRATIC = 32**3


class Repeatable(Protocol):
    """What is timed."""

    def run(self, backward: bool) -> dict[str, Tensor]:
        """Do it once; results by name, where there are any to compare."""


@dataclass
class Runner:
    """One call that can be repeated.

    Attributes:
        forward: returns the outputs.
        leaves: tensors whose gradients are taken, by name; equal names must give equal gradients.
        grads: gradients that reach the outputs.
        backend: of the library, forced while it runs; empty: none.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    grads: tuple[Tensor, ...]
    backend: str = ""

    def run(self, backward: bool) -> dict[str, Tensor]:
        """Outputs by number and, with ``backward``, gradients by name."""
        with use_backend(self.backend) if self.backend else nullcontext():
            with torch.set_grad_enabled(backward):
                outputs = self.forward()
            found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
            if backward:
                reached = outputs[: len(self.grads)]
                grads = torch.autograd.grad(reached, list(self.leaves.values()), self.grads)
                for name, grad in zip(self.leaves, grads, strict=True):
                    found[f"gradient of {name}"] = grad
        return found


@dataclass(frozen=True)
class Peer:
    """A way to compute a case.

    Attributes:
        make: the runner for one set of inputs.
        why_not: for (case, device, backward), why it can't run, or an empty string.
        growth: its cost grows with this power of the number of voxels.
    """

    make: Callable[[Case, Inputs, bool], Runner]
    why_not: Callable[[Case, str, bool], str] = lambda case, device, backward: ""
    growth: Callable[[Case], int] = lambda case: 1


def requires_grad(inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """The leaves of a case, ready to get gradients."""
    return {
        name: inputs.arguments[position].requires_grad_(backward)
        for name, position in inputs.leaves.items()
    }


def function_of(operator: str) -> Callable[..., Any]:
    """The public function of an operator, which takes tensors one by one."""
    if operator != "rcu":
        return getattr(grcsf_kernels, operator)

    def rcu(x: Tensor, maps: Tensor, *weights: Tensor, **options: Any) -> Any:
        return grcsf_kernels.rcu(x, maps, grcsf_kernels.RCUWeights(*weights), **options)

    return rcu


def backend_peer(operator: str, backend: str) -> Peer:
    """The operator of the library on one backend."""
    function = function_of(operator)

    def make(case: Case, inputs: Inputs, backward: bool) -> Runner:
        def forward() -> tuple[Tensor, ...]:
            result = function(*inputs.arguments, **inputs.options)
            return result if isinstance(result, tuple) else (result,)

        return Runner(forward, requires_grad(inputs, backward), inputs.grads, backend)

    def reason(case: Case, device: str, backward: bool) -> str:
        if backend == "reference" and case.patch is None and case.voxels > LARGEST_QUADRATIC:
            return "quadratic in the volume: hours"
        return why_not(backend, operator, device)

    def growth(case: Case) -> int:
        return 2 if case.patch is None and backend == "reference" else 1

    return Peer(make, reason, growth)


def backend_peers(operator: str) -> dict[str, Peer]:
    """One peer for each backend, by the backend's name."""
    return {backend: backend_peer(operator, backend) for backend in BACKENDS}

# SPDX-License-Identifier: Apache-2.0
"""The reference under ``torch.compile``, forward and backward each as one compiled function.

This is the strongest thing that ``torch.compile`` makes of the mathematics: it gets our explicit
backward, which recomputes. Compiled from forward alone, through autograd, gcu takes twice as long
(the peer ``autograd + compile`` shows it).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Inputs
from benchmarks.peers import Peer, Runner, backend_peer, requires_grad

# Unrolled by the compiler, hundreds of chunks of a volume would take hours: one chunk is compiled.
_CHUNKS_OF_RCU = ("_added", "_chunk_gradients")


def _functions(operator: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    torch.compiler.reset()
    reference = importlib.import_module(f"grcsf_kernels.reference.{operator}")
    if operator != "rcu":
        return (
            torch.compile(reference.forward, dynamic=False),
            torch.compile(reference.backward, dynamic=False),
        )
    compiled = {
        name: torch.compile(getattr(reference, name), dynamic=False) for name in _CHUNKS_OF_RCU
    }

    def swapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            eager = {name: getattr(reference, name) for name in compiled}
            vars(reference).update(compiled)
            try:
                return function(*arguments)
            finally:
                vars(reference).update(eager)

        return call

    return swapped(reference.forward), swapped(reference.backward)


def _options(operator: str, case: Case, inputs: Inputs) -> tuple[Any, ...]:
    axes = len(case.space)
    if operator == "residual_map":
        return [inputs.options["patch_size"]] * axes, True, "residuals", 1e-6
    if operator == "gcu":
        return "dissimilarity", 1e-6
    return (inputs.options["patch_size"] or list(case.space),)


def compiled_peer(operator: str) -> Peer:
    """The peer ``compile`` of an operator."""
    reference = backend_peer(operator, "reference")
    functions: dict[tuple[Case, bool], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def make(case: Case, inputs: Inputs, backward: bool) -> Runner:
        if (case, backward) not in functions:
            functions.clear()
            functions[case, backward] = _functions(operator)
        forward, gradients = functions[case, backward]
        options = _options(operator, case, inputs)
        needs = [position in inputs.leaves.values() for position in range(len(inputs.arguments))]
        if operator == "residual_map":
            needs = needs[:2]

        class Compiled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                result = forward(*arguments, *options)
                ctx.save_for_backward(*arguments)
                ctx.scores = result[1] if operator == "rcu" else None
                ctx.set_materialize_grads(True)
                return result

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                scores = () if ctx.scores is None else (ctx.scores,)
                found = gradients(*grads, *scores, *ctx.saved_tensors, *options, needs)
                return *found, *[None] * (len(ctx.saved_tensors) - len(found))

        def call() -> tuple[Tensor, ...]:
            result = Compiled.apply(*inputs.arguments)
            return result if isinstance(result, tuple) else (result,)

        return Runner(call, requires_grad(inputs, backward), inputs.grads)

    def why_not(case: Case, device: str, backward: bool) -> str:
        if case.family not in ("size", "dtype", "scaling", "global"):
            return "compiling takes longer than it tells"
        return reference.why_not(case, device, backward)

    return Peer(make, why_not, reference.growth)

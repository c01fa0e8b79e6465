# SPDX-License-Identifier: Apache-2.0
"""What the operator tests share: backends, tolerances, layouts and one example of each operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import grcsf_kernels
from grcsf_kernels import native
from grcsf_kernels.dispatch import BACKENDS, EMULATED, OPERATORS, why_not
from grcsf_kernels.triton import interpreting

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# (relative error of the norm and of the worst element) of outputs, and of gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1e-2, 1e-2),
}


def runs_on(operator: str) -> list[tuple[str, str]]:
    """Every (backend, device) on which the operator runs here."""
    return [
        (backend, device)
        for device in DEVICES
        for backend in (*BACKENDS, EMULATED)
        if not why_not(backend, operator, device)
    ]


def interpreted(backend: str) -> bool:
    """Whether a backend runs on Triton's interpreter, which is slow: large tests are smaller."""
    return backend == "triton" and interpreting()


def slow(backend: str) -> bool:
    """Whether kernels are interpreted or emulated: large tests are smaller."""
    return interpreted(backend) or backend == EMULATED


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that imports the installed package, not the checkout."""
    installed = "import sys\nsys.path = [path for path in sys.path if path]\n"
    return subprocess.run(
        [sys.executable, "-c", installed + code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def run_native(code: str, *arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``_C`` on an instruction set, in an interpreter that never loads torch."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {native.library().__file__!r})\n"
        "_C = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
    )
    return run_python(load + code, *arguments, GRCSF_CPU_ISA=isa)


def _isas() -> list[str]:
    """The instruction sets that the CPU kernels were built for and that this processor has."""
    if why_not("cpu", "gcu", "cpu"):
        return []
    every = ("portable", "avx2", "avx512")
    return [isa for isa in every if run_native("print(_C.isa())", isa=isa).stdout.strip() == isa]


ISAS = _isas()
ALL_RUNS = [(op, *run) for op in OPERATORS for run in runs_on(op)]


def assert_close(
    actual: Tensor, exact: Tensor, dtype: torch.dtype, *, gradient: bool = False, what: str = ""
) -> None:
    """The relative error of the norm and of the worst element (over the largest) are in bounds."""
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    bound = TOLERANCES[dtype][1 if gradient else 0]
    error = actual - exact
    scale, largest = exact.norm(), exact.abs().amax() if exact.numel() else exact.new_zeros(())
    if scale == 0:
        assert error.abs().max() <= bound, f"{what}: expected zeros"
        return
    assert error.norm() / scale <= bound, f"{what}: {error.norm() / scale:.2e} > {bound}"
    worst = error.abs().amax() / largest
    assert worst <= bound, f"{what}: worst element {worst:.2e} > {bound}"


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels-last layout, 2D or 3D."""
    form = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=form)


def sliced(tensor: Tensor) -> Tensor:
    """The same values with a gap between channels, as after splitting a concatenation."""
    return torch.cat([tensor, tensor + 1], dim=1)[:, : tensor.shape[1]]


def channels_last_sliced(tensor: Tensor) -> Tensor:
    """The same values, a channel slice of a channels-last tensor."""
    return channels_last(torch.cat([tensor, tensor + 1], dim=1))[:, : tensor.shape[1]]


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element along the last axis of a larger tensor."""
    return torch.stack([tensor, tensor - 1], dim=-1).flatten(-2)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same values, the last two axes exchanged in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "sliced": sliced,
    "channels_last_sliced": channels_last_sliced,
    "strided": strided,
    "transposed": transposed,
}


def rcu(x: Tensor, maps: Tensor, *weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`grcsf_kernels.rcu` with its weights one by one."""
    return grcsf_kernels.rcu(x, maps, grcsf_kernels.RCUWeights(*weights), **options)


def function(operator: str) -> Callable[..., Any]:
    """The public function of an operator, which takes tensors one by one."""
    return rcu if operator == "rcu" else getattr(grcsf_kernels, operator)


@dataclass
class Example:
    """One call of an operator: ``function(*arguments, **options)``."""

    function: Callable[..., Any]
    op: Any  # the torch.ops overload
    arguments: list[Any]
    options: dict[str, Any]
    data: tuple[int, ...]  # positions of the arguments that have a layout

    def __call__(self) -> tuple[Tensor, ...]:
        result = self.function(*self.arguments, **self.options)
        return result if isinstance(result, tuple) else (result,)

    def tensors(self) -> list[Tensor]:
        """The differentiable arguments."""
        return [a for a in self.arguments if isinstance(a, Tensor) and a.is_floating_point()]

    def requires_grad(self) -> Example:
        """Ask for the gradient of every differentiable argument."""
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self


def example(
    operator: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    space: tuple[int, ...] | None = None,
    batch: int = 2,
    seed: int = 0,
) -> Example:
    """A small random call of ``operator``; sizes are odd where the operator lets them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    if operator == "residual_map":
        space = space or (4, 6, 8)
        tokens = 1
        for size in space:
            tokens *= size // 2
        values = 3 * 2 ** len(space)
        hidden = torch.rand(4, batch, tokens, generator=generator) < 0.6
        arguments = [
            random(batch, 3, *space, dtype=dtype),
            random(4, batch, tokens, values, dtype=dtype),
            hidden.to(device),
        ]
        options = {"patch_size": [2] * len(space), "normalized_target": True}
        data: tuple[int, ...] = (0,)
    elif operator == "gcu":
        space = space or (5, 7, 6)
        deep = [(size + 1) // 2 for size in space]
        arguments = [
            random(batch, 4, *space, dtype=dtype),
            random(batch, 4, *deep, dtype=dtype),
            random(batch, 4),
            random(batch, 4),
        ]
        options, data = {}, (0, 1)
    else:
        space = space or (4, 3, 5)
        channels, maps, heads, hidden_units = 4, 2, 3, 5
        shapes = [
            (maps, heads, 1, channels),
            (maps, heads, 1),
            (maps, channels, heads, 1),
            (maps, channels),
            (hidden_units, channels + maps),
            (batch, hidden_units),
            (hidden_units,),
            (),
        ]
        arguments = [
            random(batch, channels, *space, dtype=dtype),
            random(batch, maps, 1, *space, dtype=dtype),
            *(random(*shape) for shape in shapes),
        ]
        options, data = {"patch_size": [3] * len(space)}, (0,)
    for position in data:
        arguments[position] = LAYOUTS[layout](arguments[position])
    return Example(
        function(operator),
        getattr(torch.ops.grcsf, operator).default,
        arguments,
        options,
        data,
    )


def values_and_gradients(
    operator: str, backend: str, layout: str = "contiguous"
) -> list[list[Tensor]]:
    """Results of an operator and its gradients for random incoming ones, by dtype of ``DTYPES``.

    The reference computes in float64, from the same rounded arguments.
    """
    found = []
    for dtype in DTYPES:
        case = example(operator, dtype=dtype, layout=layout)
        if backend == "reference":
            case.arguments = [
                a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in case.arguments
            ]
        case.requires_grad()
        generator = torch.Generator().manual_seed(1)
        with grcsf_kernels.use_backend(backend):
            outputs = case()
            # Rounded to the data's dtype, of which scores are not: exact in either.
            grads = [
                torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o)
                for o in outputs
            ]
            gradients = torch.autograd.grad(outputs, case.tensors(), grads)
        found.append([o.detach() for o in (*outputs, *gradients)])
    return found

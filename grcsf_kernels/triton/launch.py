# SPDX-License-Identifier: Apache-2.0
"""How a Triton kernel is started: its parameters, its grid, and a way to look at launches.

Every launch goes through :func:`launch`. Tile sizes and numbers of warps come from
a table, ``<operator>.json``, by kernel, architecture, dtype and shape class;
``benchmarks/gpu/tune.py`` writes it. Nothing is tuned at a user's call.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grcsf_kernels.triton import interpreting

# The architectures that kernels are compiled for ahead of time, and that the table has rows for.
ARCHITECTURES = (80, 90, 100)

# What the interpreter counts as. Its rows have larger tiles: it takes as long for a small tile as
# for a large one. Where there is no such row it takes those of the oldest architecture.
INTERPRETER = 0

# A tensor of more elements needs 64-bit offsets inside a tile.
_LARGEST_32_BIT = 2**31 - 1

# What is not a constant of a kernel but an option of its compiler.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")

_GROUPS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "half",
    torch.float16: "half",
}


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of run.

    Attributes:
        kernel: the jitted function.
        programs: how many programs the grid has.
        arguments: by name, what is passed at run time.
        constants: by name, compile-time constants.
        options: ``num_warps``, ``num_stages`` and ``maxnreg``.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


class Recording(list[Launch]):
    """Launches that were recorded instead of run.

    Attributes:
        rows: the rows of tables that their parameters came from, each with its operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, dict[str, Any]]] = []


_recorded: Recording | None = None
_recorded_architecture = 0


@contextmanager
def recording(architecture: int) -> Iterator[Recording]:
    """Record launches for ``architecture`` instead of running them; tensors may be on meta."""
    global _recorded, _recorded_architecture
    before = _recorded, _recorded_architecture
    _recorded, _recorded_architecture = Recording(), architecture
    try:
        yield _recorded
    finally:
        _recorded, _recorded_architecture = before


@functools.lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(tensor: Tensor) -> int:
    """The compute capability that a kernel on this tensor is made for: 90 for 9.0."""
    if _recorded is not None:
        return _recorded_architecture
    if interpreting():
        return INTERPRETER
    index = tensor.device.index
    return _capability(torch.cuda.current_device() if index is None else index)


@functools.lru_cache
def table(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a table of launch parameters."""
    return tuple(json.loads(path.read_text())["rows"])


def table_path(operator: str) -> Path:
    """The table in use: in the folder ``GRCSF_TRITON_PARAMETERS``, or what the package brings."""
    folder = os.environ.get("GRCSF_TRITON_PARAMETERS")
    return (Path(folder) if folder else Path(__file__).parent / "parameters") / f"{operator}.json"


@functools.lru_cache
def _row(path: Path, kernel: str, arch: int, dtype: str, shape: str) -> dict[str, Any]:
    interpreted = arch == INTERPRETER
    rows = [
        row
        for row in table(path)
        if row["kernel"] == kernel
        and row["dtype"] == dtype
        and row["shape"] in (shape, "any")
        and row["architecture"] <= max(arch, ARCHITECTURES[0])
        and (interpreted or row["architecture"] != INTERPRETER)
    ]
    if not rows:
        raise LookupError(f"{path} has no row for {kernel}, {dtype}, shape {shape}, sm_{arch}")
    return max(
        rows,
        key=lambda row: (
            interpreted and row["architecture"] == INTERPRETER,
            row["shape"] == shape,
            row["architecture"],
        ),
    )


def parameters(operator: str, kernel: str, tensor: Tensor, shape: str = "any") -> dict[str, int]:
    """Tile sizes of a kernel, and the compiler's options: warps, stages, registers of a thread.

    A row of the tensor's own shape class comes before one for any shape, and the newest
    architecture that is not newer than the device before older ones.

    Args:
        operator: whose table it is.
        kernel: the name in the table, such as ``"forward"``.
        tensor: gives device and dtype.
        shape: the operator's own shape class.
    """
    group = _GROUPS[tensor.dtype]
    row = _row(table_path(operator), kernel, architecture(tensor), group, shape)
    if _recorded is not None:
        _recorded.rows.append((operator, row))
    return dict(row["parameters"])


def precision(tensor: Tensor) -> str:
    """How the data of ``tensor`` goes through matrix products, see ``primitives.dot``.

    Half-precision data is exact in TF32, and 2^-12 in the weights is below its own rounding;
    float32 takes three TF32 products, which keep 22 bits. float64 is summed in float64.
    """
    if tensor.dtype == torch.float64:
        return "float64"
    if INTERPRETER < architecture(tensor) < ARCHITECTURES[0]:
        return "ieee"
    return "tf32x3" if tensor.dtype == torch.float32 else "tf32"


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets inside these tensors need 64 bits."""
    return any(tensor is not None and tensor.numel() > _LARGEST_32_BIT for tensor in tensors)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_2(size: int, least: int = 1) -> int:
    """The least power of two that is not below ``size`` or ``least``."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start ``kernel`` on a grid of ``programs`` programs along x, on the device of its tensors.

    Args:
        kernel: a function under ``triton.jit``.
        programs: the size of the grid; nothing is started for 0.
        arguments: what is passed at run time, in the kernel's order.
        constants: its ``tl.constexpr`` parameters, and the compiler's options.
    """
    if programs == 0:
        return
    if _recorded is not None:
        options: dict[str, int] = {n: constants.pop(n) for n in _OPTIONS if n in constants}
        named = dict(zip(_runtime_names(kernel), arguments, strict=True))
        _recorded.append(Launch(kernel, programs, named, constants, options))
        return
    if interpreting():
        # NumPy warns of what a GPU does silently: masked lanes may overflow or divide by zero.
        with np.errstate(all="ignore"):
            kernel[(programs,)](*arguments, **constants)
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **constants)


def _runtime_names(kernel: Any) -> Sequence[str]:
    # Read off the function itself: under the interpreter a kernel does not list its parameters.
    parameters = inspect.signature(kernel.fn).parameters.values()
    return [p.name for p in parameters if "constexpr" not in str(p.annotation)]

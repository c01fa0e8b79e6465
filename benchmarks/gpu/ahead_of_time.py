# SPDX-License-Identifier: Apache-2.0
"""Compile a recorded launch without a GPU, and what the compiler says of it.

A launch that was recorded on meta tensors is compiled for an architecture as Triton would compile
it at a user's call: with the same types, the same integers taken as constants, the same
divisibilities. Not under Triton's interpreter: ``TRITON_INTERPRET`` must not be 1 when Triton is
imported.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grcsf_kernels.triton.launch import Launch

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# What Triton tells the compiler of a pointer or an integer that is a multiple of 16.
_ALIGNED = (("tt.divisibility", 16),)


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has.

    Attributes:
        warps: that it holds at once.
        blocks: that it holds at once.
        shared: bytes of shared memory for all blocks, each of which takes 1 KiB more than it asks.
        shared_of_block: the most that one block may ask for.
    """

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


_KIB = 1024
_REGISTERS = 65536
_LIMITS = {
    70: Limits(64, 32, 96 * _KIB, 96 * _KIB),
    75: Limits(32, 16, 64 * _KIB, 64 * _KIB),
    80: Limits(64, 32, 164 * _KIB, 163 * _KIB),
    86: Limits(48, 16, 100 * _KIB, 99 * _KIB),
    87: Limits(48, 16, 164 * _KIB, 163 * _KIB),
    89: Limits(48, 24, 100 * _KIB, 99 * _KIB),
    90: Limits(64, 32, 228 * _KIB, 227 * _KIB),
    100: Limits(64, 32, 228 * _KIB, 227 * _KIB),
    120: Limits(48, 32, 100 * _KIB, 99 * _KIB),
}


def limits(architecture: int) -> Limits:
    """The limits of an architecture, or of the newest known one that is not newer."""
    return _LIMITS[max(known for known in _LIMITS if known <= max(architecture, min(_LIMITS)))]


def occupancy(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Warps that a multiprocessor holds of a kernel with ``warps`` in a block; 0: it does not fit.

    Registers are given out to warps in units of 256, and warps of a block to four schedulers.
    """
    has = limits(architecture)
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = _REGISTERS // of_warp // 4 * 4 // warps
    by_shared = has.shared // (-(-(shared + _KIB) // 128) * 128)
    if shared > has.shared_of_block:
        return 0
    return min(by_registers, by_shared, has.blocks, has.warps // warps) * warps


@dataclass(frozen=True)
class Compilation:
    """All that a compiled kernel depends on; equal ones are the same binary.

    Attributes:
        module: where the kernel is defined.
        kernel: its name.
        architecture: that it is compiled for: 90 for 9.0.
        signature: names and types of the parameters.
        constants: positions and values of what is known at compile time.
        aligned: positions of what is known to be a multiple of 16.
        options: ``num_warps`` and the like.
    """

    module: str
    kernel: str
    architecture: int
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def named_constants(self) -> dict[str, Any]:
        """The kernel's ``tl.constexpr`` parameters that are no tuples."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}

    @classmethod
    def of(cls, launch: Launch, architecture: int) -> Compilation:
        """The compilation that a launch would make."""
        signature, constants, aligned = [], {}, []
        options = dict(launch.options)
        names = [parameter.name for parameter in launch.kernel.params]
        options |= {name: v for name, v in launch.constants.items() if name not in names}

        def kind(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(kind(v, (*path, i), parameter) for i, v in enumerate(value))
            if value is None:
                constants[path] = value
                return "constexpr"
            if isinstance(value, torch.Tensor):
                if not parameter.do_not_specialize_on_alignment:
                    aligned.append(path)
                return f"*{_TYPES[value.dtype]}"
            if isinstance(value, bool):
                return "u1"
            if isinstance(value, int):
                specialized = not parameter.do_not_specialize
                if value == 1 and specialized:
                    constants[path] = 1
                    return "constexpr"
                if value % 16 == 0 and specialized:
                    aligned.append(path)
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            return "fp32"

        for index, parameter in enumerate(launch.kernel.params):
            name = parameter.name
            if parameter.is_constexpr:
                constants[(index,)] = launch.constants[name]
                signature.append((name, "constexpr"))
            else:
                signature.append((name, kind(launch.arguments[name], (index,), parameter)))
        function = launch.kernel.fn
        return cls(
            function.__module__,
            function.__name__,
            architecture,
            tuple(signature),
            tuple(sorted(constants.items())),
            tuple(aligned),
            tuple(sorted(options.items())),
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler says.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory: what is spilled.
        shared: bytes of a block.
        warps: of a block.
        occupancy: warps that a multiprocessor holds at once.
        seconds: that compiling took.
        error: why it does not compile, or an empty string.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    occupancy: int = 0
    seconds: float = 0.0
    error: str = ""


def compile_one(compilation: Compilation) -> Compiled:
    """Compile; an error is part of the answer, so that one kernel does not end a run of many."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    kernel = getattr(importlib.import_module(compilation.module), compilation.kernel)
    attributes = {path: [list(pair) for pair in _ALIGNED] for path in compilation.aligned}
    source = ASTSource(kernel, dict(compilation.signature), dict(compilation.constants), attributes)
    target = GPUTarget("cuda", compilation.architecture, 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(compilation.options))
    except Exception as problem:
        text = f"{type(problem).__name__}: {str(problem).strip()[-400:]}"
        return Compiled(error=text, seconds=time.perf_counter() - start)
    registers, stack = _resources(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    held = occupancy(compilation.architecture, registers, shared, warps)
    return Compiled(registers, stack, shared, warps, held, time.perf_counter() - start)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, from the tool that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])

# SPDX-License-Identifier: Apache-2.0
"""The native kernels of ``csrc/``: backends ``cpu`` and ``cuda``, both in ``grcsf_kernels._C``.

Each file hands one operator's tensors to ``_C`` as DLPack capsules. ``_C`` knows nothing of torch,
so one build works with every torch version.
"""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.common.backends import EMULATED

_PACKAGE = Path(__file__).resolve().parent.parent


@cache
def _load() -> tuple[ModuleType | None, str]:
    """``_C``, or None and the reason why it is missing."""
    try:
        module = importlib.import_module("grcsf_kernels._C")
    except ImportError as error:
        return None, _missing(error)
    libraries = Path(torch.__file__).resolve().parent / "lib"
    # Any of torch's own libraries knows the OpenMP runtime that torch uses.
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if module.share_openmp(str(libraries / name)):
            break
    return module, ""


def build_info() -> dict[str, str]:
    """Why a part was not built, by part (``native``, ``cuda``); empty strings where it was."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError:
        return {}


def _missing(error: ImportError) -> str:
    if list(_PACKAGE.glob("_C.*")):
        return f"grcsf_kernels._C can't be imported: {error}"
    reason = build_info().get("native", "")
    return reason or 'grcsf_kernels._C is not built: run "pip install ." in the checkout'


def library() -> ModuleType:
    """``grcsf_kernels._C``."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def why_not(backend: str) -> str:
    """The reason why ``cpu`` or ``cuda`` can't run here, or an empty string."""
    module, reason = _load()
    if module is None:
        return reason
    if backend == "cuda":
        info = module.cuda_info()
        if info is None:
            return build_info().get("cuda") or "the package was built without CUDA"
        return info["problem"]
    if backend == EMULATED and not operators(EMULATED):
        return "only a build for tests has it (make emulate)"
    return ""


def device_types(backend: str) -> tuple[str, ...]:
    """The device type of the backend's tensors."""
    return ("cuda",) if backend == "cuda" else ("cpu",)


def operators(backend: str) -> tuple[str, ...]:
    """The operators that the build has a kernel for."""
    return library().operators().get(backend, ())


def resources(tensor: Tensor) -> tuple[int, int, Any]:
    """What a kernel on this tensor may use besides its arguments, as ``_C`` takes it.

    Threads of the CPU; the current CUDA stream of the tensor's device; and a function that gives
    memory there for partial results: bytes -> (what to hold on to, address).
    """

    def allocate(size: int) -> tuple[Tensor, int]:
        memory = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        return memory, memory.data_ptr()

    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
    return torch.get_num_threads(), stream, allocate


def capsule(tensor: Tensor | None) -> object:
    """A DLPack capsule of ``tensor``, which must outlive the call; None stays None."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return torch.utils.dlpack.to_dlpack(
        tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    )


# The codes of DLPack's dtypes.
_DLPACK_TYPES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
}


def result_like(tensor: Tensor) -> Tensor:
    """An uninitialized tensor of this shape, dtype and layout, for a result.

    Large ones on CPU come from a pool (``csrc/cpu/runtime/pool.h``): clearing fresh pages takes as
    long as computing what goes there. ``GRCSF_RESULT_POOL=0`` switches it off.
    """
    module = library()
    pooled = (
        tensor.device.type == "cpu"
        and tensor.nbytes >= module.pooled_from
        and os.environ.get("GRCSF_RESULT_POOL", "1") != "0"
    )
    if not pooled:
        return torch.empty_like(tensor)
    code, bits = _DLPACK_TYPES[tensor.dtype]
    return torch.utils.dlpack.from_dlpack(
        module.pooled_tensor(list(tensor.shape), list(tensor.stride()), code, bits)
    )


def volume(tensor: Tensor) -> Tensor:
    """A 2D image [B, C, H, W] as a volume of depth 1, without a copy; volumes stay."""
    return tensor.unsqueeze(2) if tensor.ndim == 4 else tensor


def sizes_3d(sizes: list[int]) -> list[int]:
    """Sizes per axis with depth 1 in front where there are two."""
    return [1] * (3 - len(sizes)) + list(sizes)

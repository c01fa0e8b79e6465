# SPDX-License-Identifier: Apache-2.0
"""The CUDA part of the build, on any machine: what the compiler made, and how errors are said."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cuda_kernels
from grcsf_kernels import native
from grcsf_kernels.dispatch import OPERATORS

pytestmark = [
    pytest.mark.xdist_group("cuda"),
    pytest.mark.skipif(
        native.library().cuda_info() is None, reason="the package was built without CUDA"
    ),
]
_PAGE = Path(__file__).parents[2] / "docs/kernels.md"
_MISSING = [] if shutil.which("c++filt") else ["c++filt"]
if not shutil.which("cuobjdump") and importlib.util.find_spec("triton") is None:
    _MISSING.append("cuobjdump")


@pytest.fixture(scope="module")
def kernels():
    if _MISSING:
        pytest.skip(f"{', '.join(_MISSING)}: not on the path")
    return cuda_kernels.resources(Path(native.library().__file__))


def test_every_operator_has_kernels_for_every_architecture(kernels):
    built = native.library().cuda_info()["architectures"]
    found = {(k.kernel, k.architecture) for k in kernels}
    for operator in OPERATORS:
        names = {name for name, _ in found if name.startswith(f"{operator}_")}
        assert len(names) >= 2, (operator, names)  # forward and backward
    for architecture in re.findall(r"\d+", built):
        assert {name for name, a in found if a == int(architecture)} == {n for n, _ in found}


def test_no_kernel_spills(kernels):
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_registers_are_those_of_the_page(kernels):
    """Of the compiler that the page names; another one gives other numbers."""
    page = _PAGE.read_text()
    part = page[page.index(cuda_kernels.MARK) :]
    if f"(nvcc {cuda_kernels.compiler()}," not in part:
        pytest.skip("another nvcc than the page's: its registers are its own")
    shown = {k.architecture for k in kernels} & {80, 90}
    if shown != {80, 90}:
        pytest.skip("built for other architectures than the page's")
    for row in cuda_kernels.register_rows([k for k in kernels if k.architecture in shown]):
        assert row in part, "write docs/kernels.md anew: see benchmarks/gpu/cuda_kernels.py"


def on_cuda(tensor: torch.Tensor) -> object:
    """A capsule that says its memory is on the first CUDA device."""
    capsule = native.capsule(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # DLTensor begins with the data's address, after which comes the type of the device.
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
    return capsule


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device would take the wrong address")
def test_an_error_names_operator_shape_and_what_cuda_says():
    image = torch.zeros(1, 1, 2, 4, 6)
    arguments = [on_cuda(image), on_cuda(torch.zeros(1, 1, 6, 8)), None, [2, 2, 2], False, False]
    with pytest.raises(RuntimeError) as caught:
        native.library().residual_map_forward(
            *arguments, 1e-6, native.resources(image), on_cuda(image.clone())
        )
    said = r"residual_map on CUDA, shape 1x1x2x4x6, the current device: .*(driver|device)"
    assert re.match(said, str(caught.value)), caught.value

# SPDX-License-Identifier: Apache-2.0
"""The native module: torch-free, in torch's thread pool, for every instruction set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import (
    DTYPES,
    ISAS,
    OPERATORS,
    assert_close,
    example,
    run_native,
    run_python,
    values_and_gradients,
)

import grcsf_kernels
from grcsf_kernels import native


def test_the_module_knows_nothing_of_torch():
    """It imports in an interpreter that never loads torch, and links none of its libraries."""
    path = native.library().__file__
    result = run_native(
        "assert 'torch' not in sys.modules\n"
        "assert _C.operators()['cpu'] == ('residual_map', 'gcu', 'rcu')\n",
        isa="",
    )
    assert result.returncode == 0, result.stderr
    if shutil.which("ldd"):
        linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        names = [line.split()[0] for line in linked.splitlines() if line.split()]  # no addresses
        assert any(name.startswith("libc.so") for name in names), linked
        for library in ("torch", "c10", "gomp", "iomp", "cudart"):
            assert not any(library in name for name in names), linked


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux has")
def test_the_thread_pool_is_that_of_torch():
    """One OpenMP runtime in the process, and it is the one that torch brought."""
    runtime = native.library().openmp_library()
    assert runtime, "no OpenMP runtime was found"
    example("residual_map")()
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line or "libiomp" in line or "libomp" in line
    }
    assert Path(runtime).resolve() in {Path(name).resolve() for name in loaded}
    torch_libraries = Path(torch.__file__).resolve().parent.parent
    assert torch_libraries in Path(runtime).resolve().parents or len(loaded) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_than_torch_has(threads):
    """torch.set_num_threads is obeyed: the process gets no thread beyond torch's own."""
    result = run_python(
        "import os, torch, grcsf_kernels\n"
        f"torch.set_num_threads({threads})\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.randn(1 << 22).exp().sum()\n"
        "before = count()\n"
        "image, tokens = torch.randn(1, 1, 64, 64, 64), torch.randn(2, 1, 512, 512)\n"
        "with grcsf_kernels.use_backend('cpu'):\n"
        "    grcsf_kernels.residual_map(image, tokens, patch_size=8)\n"
        "assert count() == before, (before, count())\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def choose_isa():
    """Chooses the instruction set; the one from before comes back after the test."""
    library = native.library()
    before = library.isa()
    yield library.choose_isa
    library.choose_isa(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_instruction_set_holds_the_bar(operator, isa, layout, choose_isa):
    """Every operator, dtype, layout and gradient on every set that this processor has."""
    choose_isa(isa)
    assert native.library().isa() == isa
    found = values_and_gradients(operator, "cpu", layout)
    exact = values_and_gradients(operator, "reference", layout)
    for dtype, ones, twos in zip(DTYPES, exact, found, strict=True):
        for index, (one, two) in enumerate(zip(ones, twos, strict=True)):
            assert_close(two, one, dtype, gradient=True, what=f"{dtype} {index}")


def test_an_instruction_set_that_is_not_there_can_not_be_chosen(choose_isa):
    with pytest.raises(RuntimeError, match="isa is 'sse9', expected portable, avx2 or avx512"):
        choose_isa("sse9")
    if ISAS != ["portable", "avx2", "avx512"]:
        with pytest.raises(RuntimeError, match="at most"):
            choose_isa("avx512")


def test_an_unknown_instruction_set_is_named():
    result = run_native("print(_C.isa())", isa="sse9")
    assert result.returncode != 0
    assert "GRCSF_CPU_ISA is 'sse9', expected portable, avx2 or avx512" in result.stderr


def test_half_precision_conversions_are_those_of_torch():
    """All 65,536 values of each half dtype are read right, and rounding to them is torch's."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    with grcsf_kernels.use_backend("cpu"):
        for dtype in (torch.float16, torch.bfloat16):
            values = bits.view(dtype)
            values = values[torch.isfinite(values)]
            values = values[: len(values) // 64 * 64]
            tokens = values.view(1, 1, -1, 64)
            image = torch.zeros(1, 1, tokens.shape[2] * 8, 8)
            residual = grcsf_kernels.residual_map(image, tokens, patch_size=8)
            expected = tokens[0, 0].float().abs().view(-1, 8).view_as(residual)
            assert torch.equal(residual, expected)

            wide = torch.randn(1, 1, 256, 256, dtype=torch.float64).float()
            wide = wide * torch.logspace(-9, 4, 256)
            zero = torch.zeros(1, 1, 1024, 64, dtype=dtype)
            narrow = wide.to(dtype)
            residual = grcsf_kernels.residual_map(narrow, zero, patch_size=8)
            assert torch.equal(residual, narrow.abs())


def test_averages_round_like_torch():
    """The mean of two neighbors is a tie: round to nearest even."""
    for dtype in (torch.float16, torch.bfloat16):
        low = torch.linspace(1, 2, 33)[:32].to(dtype)
        high = torch.nextafter(low, torch.full_like(low, 10))
        prediction = torch.stack([low, high]).view(2, 1, 2, 16)
        image = torch.zeros(1, 1, 8, 4, dtype=dtype)
        with grcsf_kernels.use_backend("cpu"):
            found = grcsf_kernels.residual_map(image, prediction, patch_size=4)
        expected = ((low.float() + high.float()) / 2).to(dtype).view(8, 4)
        assert torch.equal(found[0, 0], expected)


def test_more_than_2_to_the_31_elements():
    """The last of 130 draws lies beyond 2^31 elements; the pages before it are never touched."""
    draws, patches = 130, 4096
    space = np.zeros((draws, 1, patches, 4096), dtype=np.float16)  # virtual memory only
    prediction = torch.from_numpy(space)
    assert prediction.numel() > 2**31
    prediction[-1, 0, -1] = torch.randn(4096).half()
    hidden = torch.zeros(draws, 1, patches, dtype=torch.bool)
    hidden[-1] = True
    image = torch.ones(1, 1, 4096, 4096)
    with grcsf_kernels.use_backend("cpu"):
        residual = grcsf_kernels.residual_map(image, prediction, hidden, patch_size=64)
    expected = (1 - prediction[-1, 0, -1].float()).abs().view(64, 64)
    assert torch.equal(residual[0, 0, -64:, -64:], expected)
    assert (residual[0, 0, :-64] == 1).all()


def test_wrong_capsules_are_refused():
    module = native.library()
    good = native.capsule(torch.zeros(1, 1, 1, 2, 2))
    options = ([1, 1, 1], False, False, 1e-6, native.resources(torch.zeros(1)))
    with pytest.raises(TypeError, match="image is not an unused DLPack capsule"):
        module.residual_map_forward(3, good, None, *options, good)
    integers = native.capsule(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="prediction has a DLPack dtype that no kernel takes"):
        module.residual_map_forward(good, integers, None, *options, good)

# SPDX-License-Identifier: Apache-2.0
"""``residual_map``: every backend that is here, forward and forward + backward.

Run with ``make bench`` or ``pytest benchmarks/``. Each row carries the bytes that must move at
least and the bandwidth of a copy measured in the same process, so that its distance from the floor
can be read off: ``floor_ratio`` is the measured median over the floor.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import grcsf_kernels
from grcsf_kernels.dispatch import BACKENDS, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [backend for backend in BACKENDS if not why_not(backend, "residual_map", DEVICE)]
DRAWS, PATCH = 4, 16


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes read and written per second by the fastest copy of 256 MiB."""
    source = torch.randn(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", [96, 192])
def test_residual_map(benchmark, bandwidth, backend, direction, size):
    torch.manual_seed(0)
    tokens = (size // PATCH) ** 3
    image = torch.randn(1, 1, size, size, size, device=DEVICE)
    prediction = torch.randn(DRAWS, 1, tokens, PATCH**3, device=DEVICE)
    hidden = torch.rand(DRAWS, 1, tokens, device=DEVICE) < 0.75
    options = {"patch_size": PATCH, "normalized_target": True}
    backward = direction != "forward"
    for tensor in (image, prediction):
        tensor.requires_grad_(backward)
    grad = torch.randn_like(image)

    def run():
        residual = grcsf_kernels.residual_map(image, prediction, hidden, **options)
        if backward:
            image.grad = prediction.grad = None
            residual.backward(grad)
        synchronize()
        return residual

    with grcsf_kernels.use_backend("reference"):
        expected = run().detach()
    with grcsf_kernels.use_backend(backend):
        error = (run().detach() - expected).norm() / expected.norm()
        assert error < 2e-6, f"a wrong result is not timed: error {error:.1e}"
        benchmark.group = f"residual_map {size}³, N = {DRAWS}, float32, {direction}, {DEVICE}"
        benchmark(run)

    # Only the draws that count have to be read.
    shown = float(hidden.float().mean()) * prediction.nbytes
    floor_bytes = shown + 2 * image.nbytes
    if backward:
        floor_bytes += shown + prediction.nbytes + 3 * image.nbytes
    median = statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        floor_bytes=int(floor_bytes),
        copy_bandwidth=bandwidth,
        floor_ratio=median / (floor_bytes / bandwidth),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )

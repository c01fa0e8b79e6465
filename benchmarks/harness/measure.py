# SPDX-License-Identifier: Apache-2.0
"""Time, launches and the limits of the machine, on CPU and CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
# The longest launch time that is hidden before a measurement, in seconds.
_LONGEST_HIDDEN = 0.02
# Cycles that a GPU does not exceed in a second: hiding a little too long is harmless.
_CYCLES_PER_SECOND = 2e9


class CudaStamp:
    """A point in the CUDA stream. The difference of two is the seconds that the GPU took."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: CudaStamp) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def timer(device: str) -> Callable[[], object]:
    """What pytest-benchmark reads before and after a call."""
    return CudaStamp if device == "cuda" else time.perf_counter


def synchronize(device: str) -> None:
    """Wait for the GPU; nothing to wait for on CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def hide_launches(device: str, host_seconds: float) -> None:
    """Keep the GPU busy until the call that follows has been launched.

    Otherwise the time between two events is that of the host wherever launching takes longer than
    running.
    """
    if device == "cuda":
        torch.cuda._sleep(int(min(1.5 * host_seconds, _LONGEST_HIDDEN) * _CYCLES_PER_SECOND))


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call to its end."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in _CPU_CACHE.glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 32 << 20


def rotations(bytes_of_one: int, device: str) -> int:
    """How many sets of inputs have to take turns so that none is still in the cache."""
    return min(32, 1 + 2 * cache_bytes(device) // max(bytes_of_one, 1))


def count_launches(call: Callable[[], object], device: str) -> int | None:
    """Kernels that one call launches on CUDA, copies and fills included; None on CPU."""
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy: the best of ten."""
    values = 1 << (28 if device == "cuda" else 26)
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def arithmetic_rate(device: str) -> float:
    """Floating-point operations per second of a large float32 matrix product, without TF32."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right, device)


def _best(call: Callable[[], object], device: str) -> float:
    now = timer(device)
    taken = []
    for _ in range(10):
        start = now()
        call()
        taken.append(now() - start)  # type: ignore[operator]
    return min(taken[1:])

# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of a call: measured, by two ways on CPU.

*Allocator.* On CUDA the caching allocator's own peak. On CPU the profiler's record of every
allocation and release of torch's allocator, from which the running sum and its peak follow: exact
to the byte, but blind to memory that native code takes from elsewhere.

*Resident.* What the kernel counted (``VmHWM``), reset just before the call: pages that were really
touched, whoever asked for them. Linux only.

Both count what lives at the peak beyond what lived before the call, so results are included.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from grcsf_kernels import native

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak beyond those before the call.

    Attributes:
        allocated: of torch's allocator.
        resident: of the process, or None where the system does not tell.
    """

    allocated: int
    resident: int | None


def measure_peak(call: Callable[[], object], device: str, longest: float = 3.0) -> Peak:
    """The peak extra memory of a call; what it returns is dropped after the peak is read.

    Args:
        call: is called once, on CPU a second time for the resident peak.
        device: ``cpu`` or ``cuda``.
        longest: a call that took longer, in seconds, is not repeated for the resident peak.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, None)
    with _without_pool():
        start = time.perf_counter()
        allocated = _profiled(call)
        if time.perf_counter() - start > longest:
            return Peak(allocated, None)
        before = _reset_resident()
        call()
        after = _status("VmHWM")
    return Peak(allocated, None if before is None or after is None else after - before)


@contextmanager
def _without_pool() -> Iterator[None]:
    """Results come from torch's allocator, which counts them, not from memory kept before."""
    before = os.environ.get("GRCSF_RESULT_POOL")
    os.environ["GRCSF_RESULT_POOL"] = "0"
    if not native.why_not("cpu"):
        native.library().empty_pool()
    try:
        yield
    finally:
        os.environ.pop("GRCSF_RESULT_POOL")
        if before is not None:
            os.environ["GRCSF_RESULT_POOL"] = before


def _profiled(call: Callable[[], object]) -> int:
    """Peak of the running sum over the allocator's events during ``call``."""
    # Not torch.profiler: it writes a trace as JSON, which takes minutes for a million events.
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as record:
        # Memory alone: a record of every operation would take more memory than is measured.
        torch.autograd._enable_record_function(False)
        try:
            call()
        finally:
            torch.autograd._enable_record_function(True)
    changes = [
        (event.start_ns(), event.nbytes())
        for event in record.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    total = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        total += change
        peak = max(peak, total)
    return peak


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _reset_resident() -> int | None:
    """Give free memory back to the system, reset the high-water mark and return what is left."""
    try:
        # Otherwise pages that malloc keeps would serve the call without being counted.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")

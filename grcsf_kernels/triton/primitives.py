# SPDX-License-Identifier: Apache-2.0
"""What several Triton kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """The matrix product of a [M, K] and b [K, N], in float32 (float64 for ``"float64"``).

    M, N and K are at least 16. Operands are widened first: every 16-bit float is exact in TF32, and
    the interpreter's product of bfloat16 is wrong. float64 has no tensor cores on most cards.
    """
    if PRECISION == "float64":
        return tl.sum(a.to(tl.float64)[:, :, None] * b.to(tl.float64)[None, :, :], axis=1)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def compute(value, PRECISION: tl.constexpr):
    """``value`` in the type that sums are taken in: float32, or float64 for float64 data."""
    if PRECISION == "float64":
        return value.to(tl.float64)
    else:
        return value.to(tl.float32)


@triton.jit
def add_to(pointer, values, mask):
    """Add to a slot that this program alone reads and writes, each element by one thread."""
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + values, mask=mask)

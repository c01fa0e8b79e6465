# SPDX-License-Identifier: Apache-2.0
"""Where measurements show Triton faster, and only there, dispatch gets a row."""

from __future__ import annotations

from benchmarks.gpu.preferences import faster_on_triton


def row(peer, median, *, case="64³ C=32 bfloat16", direction="forward", spread=0.02, voxels=64**3):
    return {
        "subject": "gcu",
        "case": case,
        "direction": direction,
        "peer": peer,
        "voxels": voxels,
        "median": median,
        "q1": median * (1 - spread),
        "q3": median * (1 + spread),
    }


def test_only_clear_differences_count():
    assert not list(faster_on_triton([row("triton", 1.0), row("cuda", 0.9)], "f"))
    assert not list(faster_on_triton([row("triton", 0.98), row("cuda", 1.0)], "f"))
    assert not list(faster_on_triton([row("triton", 0.5), row("cpu", 1.0)], "f"))
    (found,) = faster_on_triton([row("triton", 0.9), row("cuda", 1.0)], "f")
    assert found["operator"] == "gcu" and found["dtype"] == "bfloat16"
    assert found["voxels"] == [2**18, 2**19] and found["source"] == "f"
    assert found["seconds"] == {"cuda": 1.0, "triton": 0.9}


def test_forward_with_backward_decides():
    rows = [row("triton", 0.9), row("cuda", 1.0)]
    rows += [row(p, t, direction="forward + backward") for p, t in (("triton", 3.3), ("cuda", 3.0))]
    assert not list(faster_on_triton(rows, "f"))

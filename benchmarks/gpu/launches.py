# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.launches``: every operator forward and backward, on small volumes.

For tools that look at single launches (compute-sanitizer, ncu): each backend of the device that has
kernels of its own, odd sizes with edge patches, both layouts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

import grcsf_kernels
from benchmarks.harness.cases import Case, make_inputs
from benchmarks.peers import backend_peer
from grcsf_kernels.dispatch import OPERATORS, why_not

GPU_BACKENDS = ("triton", "cuda")


def small_cases(operator: str, large: bool) -> Iterator[Case]:
    """Edge patches for rcu, whole patches for residual_map; ``large`` fills a GPU."""
    if large:
        channels = 1 if operator == "residual_map" else 32
        yield Case(operator, "launch", (128, 128, 128), channels, "bfloat16")
        return
    space = (32, 16, 48) if operator == "residual_map" else (13, 10, 17)
    for layout in ("contiguous", "channels_last"):
        for dtype in ("float32", "bfloat16"):
            yield Case(operator, "launch", space, 8, dtype, layout)


def run(backends: tuple[str, ...], device: str, large: bool) -> list[str]:
    """Run what there is; the names of what was run."""
    done = []
    for operator in OPERATORS:
        for backend in backends:
            if why_not(backend, operator, device):
                continue
            for case in small_cases(operator, large):
                inputs = make_inputs(case, device, 0)
                backend_peer(operator, backend).make(case, inputs, True).run(True)
            done.append(f"{operator} on {backend}")
    if device == "cuda":
        torch.cuda.synchronize()
    return done


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 0 also where there was nothing to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launches", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--large", action="store_true", help="volumes that fill a GPU")
    options = parser.parse_args(arguments)
    backends = GPU_BACKENDS if options.device == "cuda" else ("cpu",)
    done = run(backends, options.device, options.large)
    found = ", ".join(done) or "no backend of this device has kernels of its own"
    sys.stdout.write(f"grcsf-kernels {grcsf_kernels.__version__}: {found}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

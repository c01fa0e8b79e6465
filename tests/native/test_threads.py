# SPDX-License-Identifier: Apache-2.0
"""The number of threads changes nothing but time, and kernels take little memory of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from support import LAYOUTS, function, run_python

import grcsf_kernels

# space, patch and channels: patch by patch, and all threads on one patch.
CALLS = {
    "gcu": ("gcu", (9, 14, 21), None, 6),
    "gcu_in_blocks_of_rows": ("gcu", (3, 600), None, 64),
    "gcu_thin": ("gcu", (1, 2, 50), None, 3),
    "rcu_by_patches": ("rcu", (11, 13, 17), 4, 6),
    "rcu_large": ("rcu", (11, 13, 17), None, 16),
    "rcu_large_patches": ("rcu", (4, 20, 40), (4, 20, 33), 12),
}


def call(operator, space, patch, channels, map_channels, layout):
    """Outputs and every gradient of a random call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x = LAYOUTS[layout](random(2, channels, *space))
    if operator == "gcu":
        deep = LAYOUTS[layout](random(2, channels, *((size + 1) // 2 for size in space)))
        arguments, options = [x, deep, random(2, channels), random(2, channels)], {}
    else:
        shapes = [
            *((2, 3, map_channels, channels), (2, 3, map_channels), (2, channels, 3, map_channels)),
            *((2, channels), (5, channels + 2 * map_channels), (2, 5), (5,), ()),
        ]
        maps = random(2, 2, map_channels, *space)
        arguments, options = [x, maps, *(random(*s) for s in shapes)], {"patch_size": patch}
    for argument in arguments:
        argument.requires_grad_()
    with grcsf_kernels.use_backend("cpu"):
        outputs = function(operator)(*arguments, **options)
        grads = torch.autograd.grad(outputs, arguments, [random(*o.shape) for o in outputs])
    return [*outputs, *grads]


@pytest.fixture
def threads():
    """torch's number of threads is as before after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_do_not_depend_on_the_number_of_threads(name, layout, threads):
    for map_channels in (1, 2) if name.startswith("rcu") else (1,):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call(*CALLS[name], map_channels, layout))
        for other in found[1:]:
            for index, (one, two) in enumerate(zip(found[0], other, strict=True)):
                assert torch.equal(one, two), f"result {index}"


MEASURE = """
import sys, torch
import grcsf_kernels
from benchmarks.harness.memory import _reset_resident, _status
operator, patch, direction = sys.argv[1:]
torch.set_num_threads(2)
patch = None if patch == "None" else int(patch)
def inputs(space, channels=32):
    x = torch.randn(1, channels, space, space, space)
    if operator == "gcu":
        half = space // 2
        return [x, torch.randn(1, channels, half, half, half), torch.rand(1, 32), torch.rand(1, 32)]
    shapes = [(2, 4, 1, 32), (2, 4, 1), (2, 32, 4, 1), (2, 32), (8, 34), (1, 8), (8,), ()]
    maps = torch.rand(1, 2, 1, space, space, space)
    return [x, maps, *(0.1 * torch.randn(shape) for shape in shapes)]
def function(x, y, *more, **options):
    if operator == "gcu":
        return grcsf_kernels.gcu(x, y, *more, **options)
    return grcsf_kernels.rcu(x, y, grcsf_kernels.RCUWeights(*more), **options)
options = {} if operator == "gcu" else {"patch_size": patch}
def run(arguments, direction):
    if direction == "forward":
        with torch.no_grad():
            before = _reset_resident()
            results = function(*arguments, **options)
    else:
        for argument in arguments:
            argument.requires_grad_()
        outputs = function(*arguments, **options)
        grads = [torch.ones_like(o) for o in outputs]
        before = _reset_resident()
        results = torch.autograd.grad(outputs, arguments, grads, retain_graph=True)
    if before is None:
        return None
    return _status("VmHWM") - before - sum(r.nbytes for r in results)
with grcsf_kernels.use_backend("cpu"):
    run(inputs(16), direction)  # code pages and thread stacks
    print(run(inputs(64), direction))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident set from /proc")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("operator", "patch"), [("gcu", None), ("rcu", 8), ("rcu", None)])
def test_no_temporary_is_as_large_as_the_volume(operator, patch, direction):
    """At 64^3 x 32 channels a full-size temporary takes 33 MB; two threads' scratch takes few."""
    result = run_python(MEASURE, operator, str(patch), direction, PYTHONPATH=_checkout())
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() == "None":
        pytest.skip("the system does not tell the peak resident set")
    assert int(result.stdout) < 12e6, f"{int(result.stdout) / 1e6:.1f} MB beyond the results"


def _checkout() -> str:
    """PYTHONPATH with benchmarks/ in reach, after whatever is on it."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), root]))

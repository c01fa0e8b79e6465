# SPDX-License-Identifier: Apache-2.0
"""Modules compiled by Inductor, forward and backward, against the same module in eager float64.

Inductor chooses strides of its own between the operators, also odd ones on axes of size 1, which no
other backend of ``torch.compile`` shows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import DynUNet

from grcsf_kernels.models import GRCSF
from grcsf_kernels.nn import GCU, RCU, CompensatedUNet

# One process compiles all, and the others have the rest of the suite.
pytestmark = pytest.mark.xdist_group("inductor")


def dynunet(dims):
    return DynUNet(dims, 1, 2, [3] * 3, [1, 2, 2], [2] * 2, filters=[4, 8, 8])


class Units(torch.nn.Module):
    """Both units, one after the other."""

    def __init__(self):
        super().__init__()
        self.gcu = GCU(4, 6, reduction=2)
        self.rcu = RCU(4, num_heads=2, head_dim=4, patch_size=2, context_channels=6)

    def forward(self, skip, deep, maps):
        context = deep.flatten(2).mean(2)
        out, dissimilarity = self.gcu(skip, deep, return_map=True)
        out, scores = self.rcu(out, maps, context, return_scores=True)
        return torch.cat([out, dissimilarity], 1) * scores.mean().to(out.dtype)


def joined(*space):
    return (torch.cat([torch.randn(1, 1, *space), torch.rand(1, 2, *space)], 1),)


def for_units(*space):
    deep = [-(-size // 2) for size in space]
    return torch.randn(2, 4, *space), torch.randn(2, 6, *deep), torch.rand(2, 2, *space)


def grcsf():
    return GRCSF(channels=(4, 8), num_heads=2, head_dim=4, patch_size=4, score_channels=4)


def image_and_maps(*space):
    return torch.randn(1, 1, *space), torch.rand(1, 2, *space)


CASES = {
    # name: module, its inputs, their sizes (a second one: compiled with dynamic sizes), dtype
    "DynUNet 2D": (lambda: CompensatedUNet(dynunet(2), patch_size=4), joined, [(16, 16)], None),
    "units 3D": (Units, for_units, [(5, 6, 4), (7, 4, 6)], None),
    "units 2D": (Units, for_units, [(6, 7)], "autocast"),
    "GRCSF 3D": (grcsf, image_and_maps, [(8, 8, 8)], None),
}
# Of forward and backward; under autocast those of bfloat16, whose step is 4e-3.
BOUNDS = {None: (2e-5, 2e-4), "autocast": (1e-2, 3e-2)}


def run(module, call, inputs, dtype):
    """The output, and the gradients of a fixed projection of it."""
    inputs = [i.detach().clone().requires_grad_() for i in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        output = call(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    leaves = [*inputs, *module.parameters()]
    return output, torch.autograd.grad((output.double() * weights).sum(), leaves, allow_unused=True)


def off(found, exact):
    """The largest error over the largest value."""
    if exact is None:
        assert found is None
        return 0.0
    assert found.shape == exact.shape and torch.isfinite(found).all()
    scale = exact.abs().max()
    return ((found.double() - exact).abs().max() / scale).item() if scale > 0 else 0.0


@pytest.fixture(scope="module", autouse=True)
def nothing_kept():
    """No code of earlier processes: what is tested is what the compiler makes today."""
    with torch._inductor.utils.fresh_cache():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_module_is_its_float64_self(name):
    make, draw, sizes, dtype = CASES[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    module = make()
    exact = copy.deepcopy(module).double()
    several = len(sizes) > 1
    compiled = torch.compile(module, fullgraph=True, dynamic=several or False)
    forward, backward = BOUNDS[dtype]
    for space in sizes:
        inputs = draw(*space)
        output, gradients = run(module, compiled, inputs, dtype)
        _, eager_gradients = run(module, module, inputs, dtype)
        expected, exact_gradients = run(exact, exact, [i.double() for i in inputs], None)
        assert off(output, expected) <= forward
        # Biases before a norm have a gradient that is 0 but for rounding.
        largest = max(g.abs().max() for g in exact_gradients if g is not None)
        for found, eager, true in zip(gradients, eager_gradients, exact_gradients, strict=True):
            if true is None or true.abs().max() < 1e-6 * largest:
                assert found is None or found.abs().max() < 1e-3 * largest
                continue
            # A gradient of few large terms of either sign is as inexact in eager bfloat16.
            assert off(found, true) <= max(backward, 2 * off(eager, true) if dtype else 0)

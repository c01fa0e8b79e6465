# SPDX-License-Identifier: Apache-2.0
"""``nn.RCU`` against textbook multi-head cross-attention built from the module's own parameters."""

from __future__ import annotations

import pytest
import torch
from attention import textbook

from grcsf_kernels.nn import RCU


@pytest.mark.parametrize("map_channels", [1, 2])
@pytest.mark.parametrize("context_channels", [None, 5])
@pytest.mark.parametrize(
    ("space", "patch"), [((5, 4, 7), 3), ((6, 5), (2, 4)), ((4, 3, 2), None), ((3, 3), 8)]
)
def test_is_textbook_attention(map_channels, context_channels, space, patch):
    torch.manual_seed(0)
    module = RCU(
        6,
        2,
        map_channels=map_channels,
        num_heads=2,
        head_dim=3,
        patch_size=patch,
        context_channels=context_channels,
        score_channels=7,
    ).double()
    x = torch.randn(2, 6, *space, dtype=torch.float64, requires_grad=True)
    residual = torch.rand(2, 2, map_channels, *space, dtype=torch.float64, requires_grad=True)
    context = None
    if context_channels:
        context = torch.randn(2, context_channels, dtype=torch.float64, requires_grad=True)
    leaves = [x, residual, *module.parameters()] + ([context] if context_channels else [])
    found = module(x, residual, context, return_scores=True)
    expected = textbook(module, x, residual, context)
    grads = [torch.randn_like(o) for o in found]
    for one, two in zip(
        (*expected, *torch.autograd.grad(expected, leaves, grads)),
        (*found, *torch.autograd.grad(found, leaves, grads)),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
    assert torch.equal(module(x, residual, context), found[0])
    if map_channels == 1:
        assert torch.equal(module(x, residual.squeeze(2), context), found[0])


def test_every_parameter_learns():
    """No parameter is without a gradient: data-parallel training would stop on one."""
    torch.manual_seed(0)
    module = RCU(8, 3, patch_size=2, context_channels=4)
    out, scores = module(
        torch.randn(2, 8, 4, 4, 4), torch.rand(2, 3, 4, 4, 4), torch.randn(2, 4), return_scores=True
    )
    (out.square().mean() + scores.mean()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_parameters_are_the_textbook_ones():
    module = RCU(8, 2, map_channels=3, num_heads=4, head_dim=5, context_channels=6)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    expected = {"map_weight": (2,), "score_hidden.weight": (32, 8 + 6 + 6)}
    expected |= {"score_hidden.bias": (32,), "score_output.weight": (1, 32)}
    expected |= {"score_output.bias": (1,)}
    for k in range(2):
        expected |= {f"query.{k}.weight": (20, 8), f"query.{k}.bias": (20,)}
        expected |= {f"key.{k}.weight": (20, 3), f"value.{k}.weight": (20, 3)}
        expected |= {f"value.{k}.bias": (20,), f"output.{k}.weight": (8, 20)}
        expected |= {f"output.{k}.bias": (8,)}
    assert shapes == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_air(dtype):
    module = RCU(4, patch_size=3)
    x = torch.zeros(1, 4, 5, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x, torch.zeros(1, 2, 5, 5, 5))
    out.float().sum().backward()
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in (x, *module.parameters()))


def test_a_module_in_bfloat16():
    module = RCU(4, patch_size=2).to(torch.bfloat16)
    out = module(torch.randn(1, 4, 4, 4).bfloat16(), torch.rand(1, 2, 4, 4))
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RCU(4, 0), "num_maps is 0"),
        (lambda: RCU(4, head_dim=0), "head_dim is 0"),
        (lambda: RCU(4)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4)), "x has shape"),
        (lambda: RCU(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4)), "maps has shape"),
        (lambda: RCU(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 5)), "maps has shape"),
        (
            lambda: RCU(4, context_channels=3)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 4)),
            r"context is missing, expected \(1, 3\)",
        ),
        (
            lambda: RCU(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 3)),
            "made without context_channels",
        ),
        (
            lambda: RCU(4, patch_size=0)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 4)),
            "patch_size is 0",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

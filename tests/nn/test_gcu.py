# SPDX-License-Identifier: Apache-2.0
"""``nn.GCU`` and ``nn.SqueezeExcitation`` against their formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grcsf_kernels.nn import GCU, SqueezeExcitation


def gate(module, x):
    means = x.flatten(2).mean(2)
    hidden = (means @ module.squeeze.weight.T + module.squeeze.bias).relu()
    return torch.sigmoid(hidden @ module.excite.weight.T + module.excite.bias)


def textbook(module, skip, deep):
    if module.deep_channels != module.channels:
        weight, bias = module.project.weight[:, :, 0], module.project.bias
        deep = torch.einsum("oc,bc...->bo...", weight, deep)
        deep = deep + bias.view(1, -1, *[1] * (deep.ndim - 2))
    ones = [1] * (skip.ndim - 2)
    one = skip * gate(module.skip_gate, skip).reshape(*skip.shape[:2], *ones)
    two = deep * gate(module.deep_gate, deep).reshape(*skip.shape[:2], *ones)
    mode = "bilinear" if skip.ndim == 4 else "trilinear"
    two = F.interpolate(two, size=skip.shape[2:], mode=mode, align_corners=False)
    dissimilarity = 1 - F.cosine_similarity(one, two, dim=1, eps=1e-6).unsqueeze(1)
    added = dissimilarity if module.compensation == "dissimilarity" else 1 - dissimilarity
    return skip * (1 + added), dissimilarity


@pytest.mark.parametrize("deep_channels", [None, 10])
@pytest.mark.parametrize("compensation", ["dissimilarity", "similarity"])
@pytest.mark.parametrize(("space", "deep_space"), [((7, 5, 6), (4, 3, 3)), ((9, 4), (5, 2))])
def test_is_the_textbook_form(deep_channels, compensation, space, deep_space):
    torch.manual_seed(0)
    module = GCU(6, deep_channels, reduction=2, compensation=compensation).double()
    skip = torch.randn(2, 6, *space, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(2, deep_channels or 6, *deep_space, dtype=torch.float64, requires_grad=True)
    leaves = [skip, deep, *module.parameters()]
    found = module(skip, deep, return_map=True)
    expected = textbook(module, skip, deep)
    grads = [torch.randn_like(o) for o in found]
    for one, two in zip(
        (*expected, *torch.autograd.grad(expected, leaves, grads)),
        (*found, *torch.autograd.grad(found, leaves, grads)),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
    assert torch.equal(module(skip, deep), found[0])


def test_parameters_have_ordinary_names():
    same, other = GCU(16), GCU(16, 32)
    gates = {
        f"{side}_gate.{layer}.{kind}"
        for side in ("skip", "deep")
        for layer in ("squeeze", "excite")
        for kind in ("weight", "bias")
    }
    assert set(same.state_dict()) == gates
    assert set(other.state_dict()) == gates | {"project.weight", "project.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_air(dtype):
    """Mixed precision with an all-zero background: finite, forward and backward."""
    module = GCU(4, 8)
    skip, deep = torch.randn(1, 4, 6, 6, 6), torch.randn(1, 8, 3, 3, 3)
    skip[..., :3], deep[..., :2] = 0, 0
    skip.requires_grad_(), deep.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = module(skip, deep)
    out.float().sum().backward()
    assert out.dtype == dtype
    for tensor in (skip, deep, *module.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_a_module_in_bfloat16():
    module = GCU(4, 8).to(torch.bfloat16)
    skip, deep = torch.randn(1, 4, 5, 5).bfloat16(), torch.randn(1, 8, 3, 3).bfloat16()
    assert module(skip, deep).dtype == torch.bfloat16


def test_channels_last_stays():
    module = GCU(4)
    skip = torch.randn(1, 4, 4, 6, 5).to(memory_format=torch.channels_last_3d)
    out = module(skip, torch.randn(1, 4, 2, 3, 3))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


def test_gates_are_float32_and_between_0_and_1():
    module = SqueezeExcitation(32, reduction=8)
    assert module.squeeze.out_features == 4
    for dtype in (torch.float32, torch.bfloat16):
        found = module(torch.randn(3, 32, 4, 4).to(dtype))
        assert found.shape == (3, 32) and found.dtype == torch.float32
        assert found.min() > 0 and found.max() < 1
    module.double()
    x = torch.randn(2, 32, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), gate(module, x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GCU(4, compensation="both"), "compensation is 'both'"),
        (lambda: GCU(0), "channels is 0"),
        (lambda: SqueezeExcitation(4, 0), "reduction is 0"),
        (lambda: GCU(4)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 2, 2)), "skip has shape"),
        (lambda: GCU(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 8, 2, 2)), "deep has shape"),
        (lambda: GCU(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2, 2)), "deep has shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

# SPDX-License-Identifier: Apache-2.0
"""``models.GRCSF`` and ``models.ResidualUNet``."""

from __future__ import annotations

import pytest
import torch

from grcsf_kernels.models import GRCSF, ResidualUNet

SMALL = {"channels": (4, 8, 8), "patch_size": 4, "num_heads": 2, "head_dim": 3}


def make(**options):
    torch.manual_seed(0)
    return GRCSF(**(SMALL | options))


@pytest.mark.parametrize("space", [(25, 23, 21), (8, 8, 8), (5, 1, 3), (1, 1, 1)])
def test_any_volume_size_trains(space):
    """Odd sizes, thin slabs, and a bottleneck of a single voxel in training mode."""
    model = make(rcu_levels=(0, 1)).train()
    logits = model(torch.randn(2, 1, *space), torch.rand(2, 2, *space))
    assert logits.shape == (2, 1, *space)
    logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_images_are_2d_as_well():
    model = make(spatial_dims=2, in_channels=3, out_channels=2, num_maps=1)
    assert model(torch.randn(1, 3, 13, 10), torch.rand(1, 1, 13, 10)).shape == (1, 2, 13, 10)


def test_every_parameter_learns():
    model = make(rcu_levels=(0, 1))
    logits = model(torch.randn(2, 1, 16, 12, 8), torch.rand(2, 2, 16, 12, 8))
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_switches_give_the_ablations():
    names = {
        (gcu, rcu): set(make(use_gcu=gcu, use_rcu=rcu).state_dict())
        for gcu in (True, False)
        for rcu in (True, False)
    }
    backbone = ResidualUNet(channels=SMALL["channels"])
    assert names[False, False] == set(backbone.state_dict())
    assert names[True, False] - names[False, False] == {
        name for name in names[True, True] if name.startswith("gcu.")
    }
    assert names[True, True] - names[True, False] == {
        name for name in names[True, True] if name.startswith("rcu.")
    }
    plain = make(use_gcu=False, use_rcu=False)
    backbone.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 9, 8, 7)
    assert torch.equal(plain(image), backbone(image))


def test_residual_maps_matter_only_with_rcu():
    image = torch.randn(1, 1, 8, 8, 8)
    one, two = torch.rand(2, 1, 2, 8, 8, 8)
    model = make()
    assert not torch.equal(model(image, one), model(image, two))
    model = make(use_rcu=False)
    assert torch.equal(model(image, one), model(image))


def test_config_rebuilds_the_model():
    for model in (make(use_gcu=False, rcu_levels=(0,)), ResidualUNet(channels=(4, 8))):
        again = type(model)(**model.config)
        again.load_state_dict(model.state_dict())


def test_compiles_in_one_graph():
    """torch.compile(fullgraph=True) of the whole model, forward and a training step."""
    model = make(channels=(4, 8), rcu_levels=(0,))
    image, residual = torch.randn(1, 1, 9, 8, 7), torch.rand(1, 2, 9, 8, 7)
    expected = model(image, residual)
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, fullgraph=True)(image, residual)
    found.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-3 * grad.norm() + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(rcu_levels=(2,)), "rcu_levels is"),
        (lambda: make(spatial_dims=1), "spatial_dims is 1"),
        (lambda: make(channels=(4,)), "at least two levels"),
        (lambda: make(blocks_per_level=0), "blocks_per_level is 0"),
        (lambda: make()(torch.zeros(1, 1, 8, 8, 8)), "maps is missing"),
        (
            lambda: make()(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8)),
            "maps is",
        ),
        (lambda: make()(torch.zeros(1, 2, 8, 8, 8)), "image has shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

# SPDX-License-Identifier: Apache-2.0
"""The paths of the Triton kernels of ``residual_map`` that small shapes do not take."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from support import LAYOUTS, assert_close, runs_on

from grcsf_kernels import residual_map, use_backend

DEVICES = [device for backend, device in runs_on("residual_map") if backend == "triton"]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def compare(device, space, patch, channels=1, draws=3, batch=1, layout="contiguous", **options):
    """Values and gradients against the reference in float64, from float32 tensors."""
    generator = torch.Generator().manual_seed(0)
    tokens, values = 1, channels
    for size, own in zip(space, patch, strict=True):
        tokens, values = tokens * (size // own), values * own
    image = torch.randn(batch, channels, *space, generator=generator)
    prediction = torch.randn(draws, batch, tokens, values, generator=generator)
    hidden = torch.rand(draws, batch, tokens, generator=generator) < 0.6
    grad = torch.randn(image.shape, generator=generator)
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        own = LAYOUTS[layout](image.to(device, dtype)).requires_grad_()
        shown = prediction.to(device, dtype).requires_grad_()
        with use_backend(backend):
            found = residual_map(own, shown, hidden.to(device), patch_size=patch, **options)
            grads = torch.autograd.grad(found, (own, shown), grad.to(device, dtype))
        results.append((found, *grads))
    names = ("residual", "gradient of image", "gradient of prediction")
    for name, exact, found in zip(names, *results, strict=True):
        assert_close(found, exact, torch.float32, gradient="gradient" in name, what=name)


@pytest.fixture
def small_tiles(tmp_path, monkeypatch):
    """A table whose tiles hold less than a patch, so that few programs show what large ones do."""
    parameters = {"BLOCK": 64, "DRAWS": 2, "num_warps": 4, "num_stages": 1}
    usual = {"architecture": 80, "dtype": "float32", "shape": "any", "parameters": parameters}
    rows = [usual | {"kernel": kernel, "source": "test"} for kernel in ("forward", "backward")]
    (tmp_path / "residual_map.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("GRCSF_TRITON_PARAMETERS", str(tmp_path))


@on_every_device
@pytest.mark.parametrize(
    ("patch", "channels", "layout"),
    [
        ((4, 4, 6), 1, "contiguous"),  # one piece and a half
        ((4, 4, 2), 3, "contiguous"),  # channels in the order of tokens
        ((4, 4, 2), 4, "contiguous"),  # channels as planes
        ((4, 4, 2), 4, "channels_last"),
        ((2, 1, 1), 64, "contiguous"),  # a voxel fills the tile
    ],
)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("average", ["residuals", "reconstructions"])
def test_patches_larger_than_a_tile(
    device, patch, channels, layout, normalized, average, small_tiles
):
    options = {"normalized_target": normalized, "average": average}
    compare(device, patch, patch, channels, layout=layout, **options)


@on_every_device
@pytest.mark.parametrize("channels", [1, 2, 3, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_small_patches_share_a_program(device, channels, layout):
    """Tokens of several rows and samples lie in one tile, the last one is not full."""
    compare(device, (2, 4, 6), (2, 2, 2), channels, batch=3, layout=layout, normalized_target=True)


@on_every_device
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_any_number_of_draws(device, draws):
    compare(device, (8, 8), (4, 4), draws=draws, normalized_target=True)


@on_every_device
@pytest.mark.parametrize("patch", [2, 8])
def test_a_nearly_constant_patch_far_from_zero(device, patch, small_tiles):
    """Statistics about the patch's own values: 1e4 squared leaves nothing of a variance of 1."""
    generator = torch.Generator().manual_seed(0)
    space = (2 * patch, patch, 8)
    image = (1e4 + torch.randn(1, 1, *space, generator=generator)).to(device)
    image[:, :, :patch] = 1e4
    prediction = torch.zeros(1, 1, 2, patch * patch * 8, device=device)
    options = {"patch_size": (patch, patch, 8), "normalized_target": True}
    with use_backend("reference"):
        expected = residual_map(image.double(), prediction.double(), **options)
    with use_backend("triton"):
        found = residual_map(image, prediction, **options)
        # Draws of 1 show the scale: sqrt(eps) where the patch is constant.
        scale = residual_map(image, prediction + 1, **options) - found
    assert (found - expected).abs().max() < 2e-3
    assert (found[:, :, :patch] == 0).all() and (scale[:, :, :patch] <= 2e-3).all()


@on_every_device
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("average", ["residuals", "reconstructions"])
def test_what_is_not_finite_stays_where_it_is(device, value, average):
    """Without statistics, in its voxel and where a draw counts there; with them, in its patch."""
    image = torch.zeros(1, 1, 4, 8, device=device)
    image[0, 0, 1, 1] = image[0, 0, 1, 5] = value
    hidden = torch.tensor([[[False, True]]], device=device)
    prediction = torch.ones(1, 1, 2, 16, device=device)
    for normalized in (False, True):
        both = []
        for backend in ("reference", "triton"):
            with use_backend(backend):
                options = {"normalized_target": normalized, "average": average}
                both.append(residual_map(image, prediction, hidden, patch_size=4, **options))
        expected, found = both
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert (found[..., :4] == 0).all()


@on_every_device
def test_64_bit_offsets_give_the_same(device, monkeypatch):
    """The wide form, forced on small tensors."""
    from grcsf_kernels.triton.residual_map import kernels

    monkeypatch.setattr(kernels, "wide", lambda *tensors: True)
    for channels, layout in itertools.product((1, 3, 4), ("contiguous", "channels_last")):
        compare(device, (4, 4, 8), (2, 4, 4), channels, layout=layout, normalized_target=True)

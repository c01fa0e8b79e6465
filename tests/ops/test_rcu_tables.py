# SPDX-License-Identifier: Apache-2.0
"""``rcu`` where a table of the attention is at its limits, against closed forms in float64.

With x of one channel, a value weight of one and a score of one, out - x is E itself, and the
gradient of x its derivative: the variance of the residual under the softmax.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from support import assert_close, rcu, runs_on, slow

from grcsf_kernels import use_backend

RUNS = [run for run in runs_on("rcu") if run[0] != "reference"]


def on(*spaces):
    """Every backend, with each space; slow ones with smaller ones."""
    found = [
        pytest.param(backend, device, SMALLER.get(space, space) if slow(backend) else space)
        for backend, device in RUNS
        for space in spaces
    ]
    return pytest.mark.parametrize(("backend", "device", "space"), found)


# In one patch of the small path, and beyond it.
SMALL, LARGE = (16, 16, 16), (26, 26, 26)
SMALLER = {SMALL: (8, 8, 8), LARGE: (9, 9, 9)}

# The worst elements of E, over the range of r, and of the variance, over its largest.
BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 2e-5)}


def arguments_for(x, residual, query_weights, query_biases, score=40.0):
    """One channel, one map, heads as given, value weights of one; the score is sigmoid(40) = 1."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    options = {"dtype": wide, "device": x.device}
    heads, batch = len(query_weights), x.shape[0]
    return [
        x,
        residual,
        torch.tensor(query_weights, **options).view(1, heads, 1, 1),
        torch.tensor(query_biases, **options).view(1, heads, 1),
        torch.ones(1, 1, heads, 1, **options),
        torch.zeros(1, 1, **options),
        torch.zeros(1, 2, **options),
        torch.zeros(batch, 1, **options),
        torch.zeros(1, **options),
        torch.tensor(score, **options),
    ]


def attend(backend, x, residual, query_weights, query_biases):
    """The sum over heads of E, and its derivative by x, from the operator."""
    x = x.clone().requires_grad_()
    with use_backend(backend):
        arguments = arguments_for(x, residual, query_weights, query_biases)
        out, _ = rcu(*arguments, patch_size=None)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return (out - x).detach().double(), grad.double() - 1


def queries(space, reach, dtype, device):
    """x evenly spread over [-reach, reach] in random order: small, so that out - x keeps E."""
    count = math.prod(space)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.linspace(-reach, reach, count)[order].view(1, 1, *space).to(device, dtype)


def two_points(space, upper, dtype, device, low=0.0, high=1.0):
    """A map that is ``high`` at ``upper`` random voxels, and ``low`` elsewhere."""
    count = math.prod(space)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    values = torch.where(order < upper, high, low)
    return values.view(1, 1, 1, *space).to(device, dtype)


def two_point_attention(a, residual):
    """E and its derivative for maps of two values: a logistic function."""
    low, high = residual.double().min(), residual.double().max()
    upper = (residual == residual.max()).sum()
    odds = torch.log(upper.double() / (residual.numel() - upper)) + a * (high - low)
    p = torch.sigmoid(odds)
    return low + p * (high - low), p * torch.sigmoid(-odds) * (high - low) ** 2


@on(SMALL, LARGE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0.1, 1.0, 9.0, 50.0, 500.0])
def test_maps_of_two_values_at_every_spread_of_queries(backend, device, space, dtype, spread):
    """Two values make the derivatives of E largest; ``spread`` is the range of a."""
    reach = 1e-3
    x = queries(space, reach, dtype, device)
    residual = two_points(space, math.prod(space) // 2, dtype, device)
    weight = torch.tensor(spread / (2 * reach), dtype=dtype).item()
    found, slope = attend(backend, x, residual, [weight], [0.0])
    expected, variance = two_point_attention(weight * x.double(), residual)
    of_mean, of_variance = BOUNDS[dtype]
    # Logits of up to spread / 2 are known to their own rounding; E follows them with a slope of
    # 1/4. The 1 that x itself adds to its gradient rounds to 1.2e-7.
    rounding = spread / 8 * 2 * torch.finfo(dtype).eps
    assert (found - expected).abs().max() <= of_mean / 2 + rounding
    error = (slope / weight - variance).abs().max() / variance.max()
    assert error <= of_variance + 4 * rounding + 2 * torch.finfo(dtype).eps / weight


@on(SMALL, LARGE)
def test_one_outlier_keeps_the_precision_of_the_variance(backend, device, space):
    """All voxels but one are equal: the variance, of 1e-4 and less, is right relative to itself."""
    reach, weight = 1e-3, 5e3
    x = queries(space, reach, torch.float32, device)
    residual = two_points(space, 1, torch.float32, device, low=100.0, high=101.0)
    _, slope = attend(backend, x, residual, [weight], [0.0])
    _, variance = two_point_attention(weight * x.double(), residual)
    # The 1 that x itself adds to its gradient rounds to 6e-8.
    error = ((slope / weight - variance).abs() - 1.2e-7 / weight) / variance
    assert error.max() < 1e-4
    x.requires_grad_()
    arguments = arguments_for(x, residual, [weight], [0.0])
    bias = arguments[3].requires_grad_()
    with use_backend(backend):
        out, _ = rcu(*arguments, patch_size=None)
        (grad,) = torch.autograd.grad(out.sum(), bias)
    assert abs(grad.item() / variance.sum().item() - 1) < 2e-5


@on(SMALL, LARGE)
def test_heads_far_apart_have_tables_of_their_own(backend, device, space):
    """Biases of -100 and 100: one head sees the least values, one the greatest, one the mean."""
    generator = torch.Generator().manual_seed(2)
    x = queries(space, 1e-3, torch.float32, device)
    residual = torch.rand(1, 1, 1, *space, generator=generator).to(device)
    weights, biases = [200.0, -300.0, 1000.0], [-100.0, 100.0, 0.0]
    found, slope = attend(backend, x, residual, weights, biases)
    voxels = residual.double().flatten()
    picked = torch.arange(0, x.numel(), 37)
    expected, derivative = torch.zeros(2, len(picked), dtype=torch.float64, device=device)
    for weight, bias in zip(weights, biases, strict=True):
        a = weight * x.double().flatten()[picked] + bias
        p = torch.softmax(a[:, None] * voxels, dim=1)
        mean = p @ voxels
        expected += mean
        derivative += weight * (p @ voxels**2 - mean**2)
    # Three values of up to 1; logits of 100 are known to 1e-5.
    assert (found.flatten()[picked] - expected).abs().max() < 3e-6
    error = (slope.flatten()[picked] - derivative).abs().max() / derivative.abs().max()
    assert error < 5e-5


@on(SMALL, LARGE)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-40])
def test_constant_maps(backend, device, space, value):
    """E is the constant, exactly; the variance is 0."""
    x = queries(space, 0.5, torch.float32, device)
    residual = torch.full((1, 1, 1, *space), value, device=device)
    x.requires_grad_()
    with use_backend(backend):
        out, _ = rcu(*arguments_for(x, residual, [3.0], [1.0]), patch_size=None)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x + residual[:, :, 0])
    assert torch.equal(grad, torch.ones_like(grad))


@on(SMALL, LARGE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_maps_with_a_large_offset(backend, device, space, dtype):
    """1000 + noise: the variance is that of the noise, as precise as without the offset."""
    generator = torch.Generator().manual_seed(3)
    reach = 1e-3
    x = queries(space, reach, dtype, device)
    residual = (1000 + torch.randn(1, 1, 1, *space, generator=generator)).to(device, dtype)
    weight = 1e3
    found, slope = attend(backend, x, residual, [weight], [0.0])
    noise = residual.double().flatten() - 1000
    picked = torch.arange(0, x.numel(), 37)
    p = torch.softmax(weight * x.double().flatten()[picked][:, None] * noise, dim=1)
    mean = p @ noise
    variance = p @ noise**2 - mean**2
    of_mean, of_variance = BOUNDS[dtype]
    # out itself is rounded at 1000.
    assert (found.flatten()[picked] - 1000 - mean).abs().max() / 1000 <= of_mean / 10
    error = (slope.flatten()[picked] / weight - variance).abs().max()
    assert error / variance.max() <= of_variance


@on((6, 5, 4), LARGE)
@pytest.mark.parametrize("scale", [1e4, 1e20])
def test_logits_so_large_that_softmax_is_the_maximum(backend, device, space, scale):
    """|a| |r| of 1e4 and beyond: E is the greatest or the least value, and gradients are finite."""
    x = torch.where(queries(space, 1.0, torch.float32, device) > 0, 1.0, -1.0)
    residual = two_points(space, 7, torch.float32, device)
    x.requires_grad_()
    residual.requires_grad_()
    arguments = arguments_for(x, residual, [scale], [0.0])
    for argument in arguments[2:]:
        argument.requires_grad_()
    with use_backend(backend):
        out, scores = rcu(*arguments, patch_size=None)
        grads = torch.autograd.grad(out.sum() + scores.sum(), arguments)
    assert_close(out - x, (x > 0).float(), torch.float32)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert_close(grads[0], torch.ones_like(x), torch.float32, gradient=True)


@on((6, 5, 4), LARGE)
def test_subnormal_values(backend, device, space):
    """x and r of 1e-40 are as good as 0: E is their mean, far below any rounding."""
    x = torch.full((1, 1, *space), 1e-40, device=device)
    residual = torch.linspace(0, 1e-40, x.numel(), device=device).view(1, 1, 1, *space)
    found, slope = attend(backend, x, residual, [1.0], [0.5])
    assert (found.abs() <= 1e-39).all() and (slope == 0).all()


@cache
def clean_patches(backend, device, space, patch):
    """x, a map, a function of both, and what it gives of them."""
    generator = torch.Generator().manual_seed(4)
    channels = 4
    x = torch.randn(1, channels, *space, generator=generator).to(device)
    residual = torch.rand(1, 1, 1, *space, generator=generator).to(device)
    weights = [
        torch.randn(shape, generator=generator).to(device)
        for shape in [
            *((1, 2, 1, channels), (1, 2, 1), (1, channels, 2, 1), (1, channels)),
            *((3, channels + 1), (1, 3), (3,), ()),
        ]
    ]

    def run(x, residual):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        with use_backend(backend):
            out, scores = rcu(*leaves, *weights, patch_size=patch)
            return out.detach(), *torch.autograd.grad(out.sum(), leaves), scores.detach()

    return x, residual, run, run(x, residual)


@on((8, 9, 12), LARGE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_what_is_not_finite_stays_inside_its_patch(backend, device, space, where, value):
    """out, scores and both gradients of data of every other patch keep their bits."""
    patch = (4, 4, 4)
    if space != (8, 9, 12):
        patch, space = (8, *space[1:]), (24, *space[1:])
    x, residual, run, clean = clean_patches(backend, device, space, patch)
    dirty = [x.clone(), residual.clone()]
    dirty[0 if where == "x" else 1][..., patch[0], 1, 2] = value
    found = run(*dirty)
    inside = torch.zeros(space, dtype=torch.bool, device=device)
    inside[patch[0] : 2 * patch[0], : patch[1], : patch[2]] = True
    for one, two in zip(clean[:3], found[:3], strict=True):
        assert torch.equal(one[..., ~inside], two[..., ~inside])
    cell = torch.zeros_like(clean[3], dtype=torch.bool)
    cell[0, 1, 0, 0] = True
    assert torch.equal(clean[3][~cell], found[3][~cell])
    if math.isnan(value):
        assert torch.isnan(found[0][..., inside]).all()

# SPDX-License-Identifier: Apache-2.0
"""NaN stays where it belongs, weights that are 0 are exactly 0, and large values overflow late."""

from __future__ import annotations

import math

import pytest
import torch
from support import ALL_RUNS, assert_close, function, rcu

import grcsf_kernels

on_every_run = pytest.mark.parametrize(("operator", "backend", "device"), ALL_RUNS)
of_gcu = pytest.mark.parametrize(
    ("backend", "device"), [run[1:] for run in ALL_RUNS if run[0] == "gcu"]
)
of_rcu = pytest.mark.parametrize(
    ("backend", "device"), [run[1:] for run in ALL_RUNS if run[0] == "rcu"]
)
of_residual_map = pytest.mark.parametrize(
    ("backend", "device"), [run[1:] for run in ALL_RUNS if run[0] == "residual_map"]
)


def touched(size, deep, index):
    """The voxels of an axis that deep voxel ``index`` has a weight in: in whole numbers."""
    found = set()
    for voxel in range(size):
        center = max((2 * voxel + 1) * deep - size, 0)
        low, rest = divmod(center, 2 * size)
        if low == index or (low + 1 == index and rest > 0):
            found.add(voxel)
    return found


# Triton reads both deep voxels, whatever they weigh (docs/operators.md).
@pytest.mark.parametrize(
    ("backend", "device"),
    [run[1:] for run in ALL_RUNS if run[0] == "gcu" and run[1] != "triton"],
)
@pytest.mark.parametrize("deep", [(2, 3, 4), (6, 9, 4), (5, 2, 12), (1, 9, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gcu_spreads_nan_to_no_voxel_in_which_it_weighs_nothing(backend, device, deep, layout):
    """Of one NaN in the deep feature: only the voxels that are interpolated from it are NaN."""
    space, index = (6, 9, 12), tuple(size // 2 for size in deep)
    form = torch.contiguous_format if layout == "contiguous" else torch.channels_last_3d
    for dtype in (torch.float32, torch.float64):
        skip = torch.randn(1, 3, *space, dtype=dtype).to(device, memory_format=form)
        features = torch.randn(1, 3, *deep, dtype=dtype)
        features[0, 1][index] = math.nan
        gates = torch.ones(1, 3, dtype=dtype, device=device)
        with grcsf_kernels.use_backend(backend):
            found = grcsf_kernels.gcu(skip, features.to(device, memory_format=form), gates, gates)[
                1
            ].isnan()
        expected = torch.zeros(space, dtype=torch.bool)
        z, y, x = (sorted(touched(*sizes)) for sizes in zip(space, deep, index, strict=True))
        expected[torch.tensor(z)[:, None, None], torch.tensor(y)[:, None], torch.tensor(x)] = True
        assert torch.equal(found.cpu()[0, 0], expected), dtype


@of_gcu
def test_gcu_is_exact_where_voxels_lie_on_deep_voxels(backend, device):
    """At 1:3 every third voxel is a deep voxel: the same feature there has dissimilarity 0."""
    deep = torch.randn(1, 5, 4, 4, 3, dtype=torch.float64)
    skip = deep.repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(3, 4)
    gates = torch.ones(1, 5, dtype=torch.float64, device=device)
    with grcsf_kernels.use_backend(backend):
        found = grcsf_kernels.gcu(skip.to(device), deep.to(device), gates, gates)[1]
    assert found[..., 1::3, 1::3, 1::3].abs().max() < 1e-15


@of_residual_map
@pytest.mark.parametrize("average", ["residuals", "reconstructions"])
def test_nan_in_an_image_reaches_its_gradients(backend, device, average):
    """The derivative of |NaN| is NaN, and a draw that does not count has a gradient of 0."""
    image = torch.randn(1, 1, 4, 4, device=device)
    prediction = torch.randn(2, 1, 4, 4, device=device)
    hidden = torch.tensor([[[True, True, True, False]], [[False, True, True, False]]])
    image[0, 0, 0, 0] = math.nan
    image.requires_grad_(), prediction.requires_grad_()
    with grcsf_kernels.use_backend(backend):
        result = grcsf_kernels.residual_map(
            image, prediction, hidden.to(device), patch_size=2, average=average
        )
        grads = torch.autograd.grad(result.sum(), [image, prediction])
    assert grads[0].isnan().sum() == 1 and grads[0][0, 0, 0, 0].isnan()
    assert grads[1][0, 0, 0].isnan().tolist() == [True, False, False, False]
    assert not grads[1][1].isnan().any() and not grads[1][1, 0, 0].any()


def rcu_call(maps, patch, scale=1.0, dtype=torch.float32, device="cpu"):
    """rcu of x of three channels and these maps: outputs and every gradient."""
    generator = torch.Generator().manual_seed(0)
    channels, heads, space = 3, 2, maps.shape[2:]
    count = maps.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [
        *((count, heads, 1, channels), (count, heads, 1), (count, channels, heads, 1)),
        *((count, channels), (4, channels + count), (1, 4), (4,), ()),
    ]
    weights = [torch.randn(shape, generator=generator).to(device, wide) for shape in shapes]
    weights[0] *= scale
    x = torch.randn(1, channels, *space, generator=generator).to(device, dtype)
    arguments = [x, maps.to(device, dtype), *weights]
    for argument in arguments:
        argument.requires_grad_()
    outputs = rcu(*arguments, patch_size=patch)
    grads = torch.autograd.grad(outputs, arguments, [torch.ones_like(o) for o in outputs])
    return [*outputs, *grads]


@of_rcu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patch", [1, 2, 3, None])
def test_rcu_of_constant_maps_and_large_queries_is_finite(backend, device, dtype, patch):
    """All residual voxels of a patch the same, below 0: softmax is even, whatever the queries."""
    maps = torch.full((1, 2, 5, 6, 3), -3.5)
    with grcsf_kernels.use_backend(backend):
        found = rcu_call(maps, patch, 3000.0, dtype, device)
    with grcsf_kernels.use_backend("reference"):
        exact = rcu_call(maps, patch, 3000.0, torch.float64)
    for index in (0, 1, 6, 7):  # outputs; gradients of value_weight and value_bias
        assert_close(found[index], exact[index], dtype, gradient=True, what=f"result {index}")
    assert all(result.isfinite().all() for result in found)


@of_rcu
@pytest.mark.parametrize("patch", [2, 4, None])
@pytest.mark.parametrize("size", [1e13, 1e15])
def test_rcu_of_huge_maps_has_finite_gradients(backend, device, patch, size):
    """Far beyond any intensity: no moment of the maps overflows on the way."""
    generator = torch.Generator().manual_seed(1)
    maps = size * torch.rand(1, 1, 4, 5, 3, generator=generator)
    with grcsf_kernels.use_backend(backend):
        found = rcu_call(maps, patch, device=device)
    assert all(result.isfinite().all() for result in found)


def _on_both(operator, arguments, **options):
    """Outputs and gradients on the CPU's kernels and on the reference."""
    found = []
    for backend in ("cpu", "reference"):
        own = [argument.clone().requires_grad_() for argument in arguments]
        with grcsf_kernels.use_backend(backend):
            outputs = function(operator)(*own, **options)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        found.append([*(o.detach() for o in outputs), *(argument.grad for argument in own)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_gcu_infinity_of_one_channel_leaves_the_gradients_of_others(width):
    """Of a zero skip beside an infinite voxel: only that voxel's channel has gradients of NaN."""
    generator = torch.Generator().manual_seed(0)
    deep = torch.randn(1, 3, 9, width, generator=generator)
    deep[0, 1, 1, 0] = -torch.inf
    gates = torch.rand(2, 1, 3, generator=generator)
    arguments = [torch.zeros_like(deep), deep, *gates]
    for actual, expected in _on_both("gcu", arguments, compensation="similarity"):
        assert torch.equal(actual.isnan(), expected.isnan())


def test_gcu_infinite_gate_leaves_the_gradient_of_deep_of_others():
    """Behind the last voxel of a row there are zeros, which an infinite gate makes NaN."""
    generator = torch.Generator().manual_seed(0)
    skip = torch.randn(1, 4, 1, 1, 2, generator=generator)
    gates = torch.rand(2, 1, 4, generator=generator)
    gates[0, 0, 2] = torch.inf
    *_, grad_deep, _, _ = _on_both("gcu", [skip, torch.zeros(1, 4, 1, 1, 1), *gates])
    actual, expected = grad_deep
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().sum() == 1


@pytest.mark.parametrize("voxels", [3, 8, 64])
def test_rcu_nan_in_the_query_of_one_head_leaves_the_gradients_of_others(voxels):
    """A head without a range of queries has no table, and takes no part in that of all heads."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    maps, heads, channels, hidden = 3, 4, 3, 3
    bias = randn(maps, heads, 1)
    bias[1, 2] = torch.nan
    arguments = [
        randn(3, channels, voxels, 1),
        randn(3, maps, voxels, 1),
        randn(maps, heads, 1, channels),
        bias,
        randn(maps, channels, heads, 1),
        randn(maps, channels),
        randn(hidden, channels + maps),
        randn(3, hidden),
        randn(hidden),
        randn(1)[0],
    ]
    for actual, expected in _on_both("rcu", arguments, patch_size=64):
        finite = actual.isfinite()
        assert torch.equal(finite, expected.isfinite())
        torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-5)


def far_maps(map_channels):
    """Arguments of rcu with maps and queries of a large common part, and a score of a half."""
    generator = torch.Generator().manual_seed(0)
    channels, heads, hidden = 4, 2, 4

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return [
        randn(2, channels, 3, 5, 4),
        100 + 0.25 * randn(2, 1, map_channels, 3, 5, 4),
        randn(1, heads, map_channels, channels),
        10 + 0.1 * randn(1, heads, map_channels),
        randn(1, channels, heads, map_channels),
        randn(1, channels),
        torch.zeros(hidden, channels + map_channels),
        torch.zeros(2, hidden),
        torch.zeros(hidden),
        torch.zeros(()),
    ]


def results_of_rcu(arguments, dtype, device, patch):
    """Outputs, and the gradients of x, the maps and the query's and value's weights."""
    own = [argument.to(device, dtype).requires_grad_() for argument in arguments]
    outputs = rcu(*own, patch_size=patch)
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(outputs[0].shape, generator=generator).to(device, dtype)
    grads = torch.autograd.grad(outputs[0], own[:6], incoming)
    return [o.detach() for o in (*outputs, *grads)], incoming


@of_rcu
@pytest.mark.parametrize("patch", [2, 3, None])
@pytest.mark.parametrize("map_channels", [1, 3])
def test_an_offset_of_the_map_costs_no_digits(backend, device, patch, map_channels):
    """Logits of 1,000 that differ by about 10: what is common to all of a patch weighs nothing."""
    arguments = far_maps(map_channels)
    with grcsf_kernels.use_backend("reference"):
        exact, _ = results_of_rcu(arguments, torch.float64, "cpu", patch)
    with grcsf_kernels.use_backend(backend):
        found, _ = results_of_rcu(arguments, torch.float32, device, patch)
    for index, (one, two) in enumerate(zip(found, exact, strict=True)):
        # Products of Triton have the digits of TF32 on some GPUs.
        bound = 3e-5 if device == "cpu" else 2e-3
        error = (one.double().cpu() - two).norm() / two.norm()
        assert error <= bound, f"result {index}"


@of_rcu
@pytest.mark.parametrize("patch", [3, None])
@pytest.mark.parametrize("map_channels", [1, 3])
def test_queries_that_choose_one_voxel_have_no_gradient(backend, device, patch, map_channels):
    """Softmax has no slope there, so x has the gradient of out, to the last digits."""
    arguments = far_maps(map_channels)
    arguments[1] *= 20
    arguments[3] *= 200
    with grcsf_kernels.use_backend(backend):
        found, incoming = results_of_rcu(arguments, torch.float64, device, patch)
    torch.testing.assert_close(found[2], incoming, rtol=1e-12, atol=1e-12)

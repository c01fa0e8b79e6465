# SPDX-License-Identifier: Apache-2.0
"""The stride of an axis of size 1 means nothing: no kernel uses it, no result has an odd one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from support import ALL_RUNS, LAYOUTS, function, rcu, slow
from torch._subclasses.fake_tensor import FakeTensorMode

import grcsf_kernels
from grcsf_kernels.ops import checks

on_every_run = pytest.mark.parametrize(("operator", "backend", "device"), ALL_RUNS)

# What views, NumPy and compilers leave on an axis of size 1.
ODD = (0, 1, 3, 4097)

# Every axis of every argument has size 1 in one of these: batch, channels, space, patch, and the
# number of draws, of maps, of their channels, of heads and of hidden units.
SIZES = {
    "one_channel": (1, 1, (4, 1, 6), 2, 1),
    "one_row": (1, 3, (1, 1, 4), 4, 1),
    "one_voxel": (2, 4, (1, 1, 1), 1, 2),
    "one_column": (1, 4, (6, 1), 2, 1),
}


def arguments_of(operator, name, device, layout="contiguous"):
    """A random call: its arguments and options."""
    batch, channels, space, patch, many = SIZES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    patches = [min(patch, size) for size in space]
    x = LAYOUTS[layout](random(batch, channels, *space))
    if operator == "residual_map":
        grid = [size // own for size, own in zip(space, patches, strict=True)]
        tokens, values = int(np.prod(grid)), channels * int(np.prod(patches))
        hidden = (random(many, batch, tokens) < 0.5).to(device)
        prediction = random(many, batch, tokens, values)
        return [x, prediction, hidden], {"patch_size": patches, "normalized_target": values > 1}
    if operator == "gcu":
        deep = LAYOUTS[layout](random(batch, channels, *((size + 1) // 2 for size in space)))
        return [x, deep, random(batch, channels), random(batch, channels)], {}
    shapes = [
        *((many, many, many, channels), (many, many, many), (many, channels, many, many)),
        *((many, channels), (many, channels + many * many), (batch, many), (many,), ()),
    ]
    maps = random(batch, many, many, *space)
    return [x, maps, *(random(*shape) for shape in shapes)], {"patch_size": patches}


def with_strides(tensor, stride):
    """The same values in the same memory, with this stride on every axis of size 1."""
    own = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided(tensor.shape, [stride if n == 1 else s for n, s in own])


def run(operator, arguments, options, strides_of_gradients=None):
    """Outputs and every gradient; the incoming gradients can have odd strides too."""
    arguments = [
        a.detach().requires_grad_() if a is not None and a.is_floating_point() else a
        for a in arguments
    ]
    outputs = function(operator)(*arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    if strides_of_gradients is not None:
        incoming = [with_strides(g, strides_of_gradients) for g in incoming]
    wanted = [a for a in arguments if a is not None and a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, incoming)]


@on_every_run
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SIZES)
def test_strides_of_axes_of_size_1_are_never_used(operator, backend, device, name, layout):
    """Whichever argument or gradient has odd ones, the bits are those of dense tensors.

    And the results have the strides that the fake kernels say, which compilers believe.
    """
    arguments, options = arguments_of(operator, name, device, layout)
    with grcsf_kernels.use_backend(backend):
        expected = run(operator, arguments, options)
        for stride in ODD[2:3] if slow(backend) else ODD:
            odd = [with_strides(a, stride) for a in arguments]
            found = run(operator, odd, options, stride)
            with FakeTensorMode() as mode:
                said = run(operator, [mode.from_tensor(a) for a in odd], options)
            for index, (one, two, fake) in enumerate(zip(expected, found, said, strict=True)):
                assert torch.equal(one, two), f"stride {stride}: result {index}"
                assert two.stride() == one.stride() == fake.stride(), f"result {index}"
                assert (two.shape, two.dtype) == (fake.shape, fake.dtype), f"result {index}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_maps_from_numpy_with_axes_that_numpy_added(backend):
    """rcu of maps that were NumPy arrays, with axes added there, against the copy of them."""
    if grcsf_kernels.dispatch.why_not(backend, "rcu", "cpu"):
        pytest.skip("the kernels were not built")
    generator = np.random.default_rng(0)
    volume = generator.standard_normal((2, 6, 5, 4)).astype(np.float32)
    maps = torch.from_numpy(volume[None, :, None])
    x = torch.randn(1, 3, 6, 5, 4)
    shapes = [(2, 3, 1, 3), (2, 3, 1), (2, 3, 3, 1), (2, 3), (4, 5), (1, 4), (4,), ()]
    weights = [torch.randn(shape) for shape in shapes]
    with grcsf_kernels.use_backend(backend):
        found = rcu(x, maps, *weights, patch_size=3)
        expected = rcu(x, maps.clone(), *weights, patch_size=3)
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)


def test_kernels_ignore_these_strides_themselves():
    """Also past the operators' checks: the reader of DLPack gives such axes dense strides."""
    from grcsf_kernels import native

    if grcsf_kernels.dispatch.why_not("cpu", "rcu", "cpu"):
        pytest.skip("the kernels were not built")
    for name, layout in product(SIZES, ("contiguous", "channels_last")):
        (x, maps, *weights), options = arguments_of("rcu", name, "cpu", layout)
        form = checks.layout_of(x)
        dense = [checks.dense(x, form), checks.dense(maps), *weights]
        expected = native.rcu.forward(*dense, options["patch_size"])
        for stride in ODD:
            odd = [with_strides(a, stride) for a in dense]
            found = native.rcu.forward(*odd, options["patch_size"])
            for one, two in zip(expected, found, strict=True):
                assert torch.equal(one, two), f"{name}, {layout}, stride {stride}"


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 5), (2, 1, 4, 1, 1), (0, 2, 1, 3, 4)])
def test_dense_tensors_have_the_strides_of_torch_empty(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for layout in (torch.contiguous_format, last):
        expected = torch.empty(shape, memory_format=layout).stride()
        assert checks.strides_of(shape, layout) == expected
        for stride in ODD:
            assert (
                checks.dense(with_strides(torch.zeros(shape), stride), layout).stride() == expected
            )

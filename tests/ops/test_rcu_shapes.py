# SPDX-License-Identifier: Apache-2.0
"""``rcu`` over shapes that take different paths through a kernel, against the reference in float64.

The CPU kernel works patch by patch where patches are small and many, and with all threads on one
patch where it is large (``patch_by_patch`` in ``csrc/cpu/rcu/attention.h``); the map's gradient
comes from a table where maps have one channel, else from the direct sum.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, LAYOUTS, assert_close, interpreted, rcu, runs_on, slow

from grcsf_kernels import use_backend
from grcsf_kernels.ops.rcu import WEIGHTS

RUNS = [run for run in runs_on("rcu") if run[0] != "reference"]
on_every_backend = pytest.mark.parametrize(("backend", "device"), RUNS)
NAMES = ("x", "maps", *WEIGHTS)

# space, patch, and (C, heads, maps, channels of a map)
SMALL = {
    "edges_of_odd_widths": ((13, 11, 17), 5, (4, 2, 2, 1)),
    "a_different_patch_on_each_axis": ((7, 17, 33), (3, 8, 16), (3, 5, 1, 1)),
    "one_channel_one_head_one_map": ((9, 10, 12), 4, (1, 1, 1, 1)),
    "one_channel_of_many_map_channels": ((8, 6, 9), (4, 3, 5), (1, 2, 1, 16)),
    "many_channels_three_maps": ((8, 7, 10), 4, (33, 1, 3, 1)),
    "two_map_channels": ((9, 8, 13), (5, 4, 6), (3, 5, 3, 2)),
    "a_flat_image": ((37, 70), (16, 33), (3, 2, 2, 1)),
    "rows_of_one_voxel": ((12, 9, 1), (4, 3, 1), (4, 2, 1, 1)),
    "patches_of_one_voxel": ((3, 4, 5), 1, (3, 5, 2, 2)),
    "patches_beyond_the_volume": ((5, 4, 6), (8, 2, 100), (5, 1, 1, 1)),
}
LARGE = {
    "several_chunks": ((11, 13, 17), None, (16, 2, 2, 1)),
    "several_chunks_and_map_channels": ((11, 13, 9), None, (16, 1, 2, 2)),
    "few_channels": ((19, 17, 18), None, (3, 1, 1, 1)),
    "many_channels": ((9, 8, 7), None, (33, 5, 3, 1)),
    "sixteen_map_channels": ((8, 8, 9), None, (33, 1, 1, 16)),
    "large_patches_with_small_edges": ((9, 10, 21), (9, 10, 16), (16, 2, 1, 1)),
    "rows_longer_than_a_chunk": ((2, 1500), None, (6, 1, 1, 1)),
}
# Slow backends: fewer patches (the interpreter takes as long for a small one), one sample.
FEWER_PATCHES = {
    "edges_of_odd_widths": (7, 5, 8),
    "a_different_patch_on_each_axis": (4, 8, 17),
    "one_channel_one_head_one_map": (5, 6, 4),
    "one_channel_of_many_map_channels": (5, 3, 6),
    "many_channels_three_maps": (4, 5, 6),
    "two_map_channels": (6, 4, 7),
    "a_flat_image": (17, 35),
    "rows_of_one_voxel": (6, 4, 1),
    "patches_of_one_voxel": (2, 1, 3),
    "several_chunks": (9, 8, 17),
    "several_chunks_and_map_channels": (7, 6, 8),
    "few_channels": (10, 9, 11),
    "many_channels": (5, 8, 7),
    "sixteen_map_channels": (4, 5, 6),
    "rows_longer_than_a_chunk": (2, 600),
}


def case(name, backend, dtype, device, layout="contiguous"):
    """Arguments and patch size of a shape."""
    space, patch, sizes = (SMALL | LARGE)[name]
    fewer = slow(backend)
    space = FEWER_PATCHES.get(name, space) if fewer else space
    batch = 1 if fewer else 2
    return make(space, sizes, dtype, device, batch=batch, layout=layout), patch


def make(space, sizes, dtype=torch.float32, device="cpu", batch=2, layout="contiguous", seed=0):
    """Random arguments; queries of about one, so that softmax is neither flat nor a maximum."""
    channels, heads, maps, map_channels = sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape, dtype=wide, scale=1.0):
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return value.to(device, dtype)

    hidden, narrow = 5, 1 / math.sqrt(channels)
    x = LAYOUTS[layout](random(batch, channels, *space, dtype=dtype))
    arguments = [
        x,
        # Residuals are never negative.
        random(batch, maps, map_channels, *space, dtype=dtype).abs(),
        random(maps, heads, map_channels, channels, scale=narrow),
        random(maps, heads, map_channels),
        random(maps, channels, heads, map_channels),
        random(maps, channels),
        random(hidden, channels + maps * map_channels, scale=narrow),
        random(batch, hidden),
        random(hidden),
        random(),
    ]
    return [argument.requires_grad_() for argument in arguments]


def results(arguments, patch, grads, needs=NAMES):
    """Outputs, and by name the gradients that ``needs`` names."""
    found = rcu(*arguments, patch_size=patch)
    leaves = [a for name, a in zip(NAMES, arguments, strict=True) if name in needs]
    grads = [grad.to(own) for grad, own in zip(grads, found, strict=True)]
    return found, torch.autograd.grad(found, leaves, grads)


def check(backend, arguments, patch, dtype, needs=NAMES):
    """Outputs and gradients are those of the reference for the same arguments in float64."""
    exact = [a.detach().double().requires_grad_() for a in arguments]
    generator = torch.Generator().manual_seed(1)
    with use_backend("reference"):
        shapes = [o.shape for o in rcu(*exact, patch_size=patch)]
        # Mostly positive: the gradients of biases are sums that must not cancel to nothing.
        grads = [
            (torch.randn(shape, generator=generator) + 0.5).to(arguments[0].device, dtype)
            for shape in shapes
        ]
        expected, expected_grads = results(exact, patch, grads, needs)
    with use_backend(backend):
        found, found_grads = results(arguments, patch, grads, needs)
    for name, one, two in zip(("out", "scores"), expected, found, strict=True):
        assert_close(two, one, dtype, what=name)
    names = [name for name in NAMES if name in needs]
    for name, one, two in zip(names, expected_grads, found_grads, strict=True):
        assert_close(two, one, dtype, gradient=True, what=f"gradient of {name}")


def on_every_layout(*dtypes):
    """Every backend, dtype and layout; slow ones with each dtype in one layout of its own.

    The interpreter leaves out float64, which takes direct sums alone: gradcheck and
    test_contract.py have it.
    """
    layouts = ("contiguous", "channels_last")
    return pytest.mark.parametrize(
        ("backend", "device", "dtype", "layout"),
        [
            (backend, device, dtype, layout)
            for backend, device in RUNS
            for i, dtype in enumerate(dtypes)
            if not (interpreted(backend) and dtype == torch.float64)
            for layout in ([layouts[i]] if slow(backend) else layouts)
        ],
    )


@on_every_layout(torch.float32, torch.float64)
@pytest.mark.parametrize("name", SMALL | LARGE)
def test_every_path_gives_the_reference(backend, device, name, layout, dtype):
    check(backend, *case(name, backend, dtype, device, layout), dtype)


@on_every_layout(torch.float16, torch.bfloat16)
@pytest.mark.parametrize(
    "name", ["edges_of_odd_widths", "two_map_channels", "several_chunks", "many_channels"]
)
def test_half_dtypes_on_every_path(backend, device, name, layout, dtype):
    check(backend, *case(name, backend, dtype, device, layout), dtype)


@on_every_backend
@pytest.mark.parametrize("name", ["edges_of_odd_widths", "two_map_channels", "several_chunks"])
def test_a_frozen_map_changes_no_other_gradient(backend, device, name):
    """Without the gradient of the map, the usual case, another path runs."""
    arguments, patch = case(name, backend, torch.float32, device)
    arguments[1].requires_grad_(False)
    needs = tuple(n for n in NAMES if n != "maps")
    check(backend, arguments, patch, torch.float32, needs)


@on_every_backend
def test_global_attention_over_a_volume(backend, device):
    """24^3 voxels of 32 channels in one patch: the attention matrix has 191 million entries."""
    space = (11, 12, 13) if slow(backend) else (24, 24, 24)
    arguments = make(space, (32, 1, 1, 1), torch.float32, device, batch=1)
    check(backend, arguments, None, torch.float32)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_patches_of_a_network(backend, device, dtype):
    """32 channels, 4 heads, 2 maps in patches of 8: the sizes the kernels are made for."""
    space = (8, 8, 16) if slow(backend) else (16, 24, 24)
    check(backend, make(space, (32, 4, 2, 1), dtype, device, batch=1), 8, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_whole_vectors(backend, device, dtype):
    """Patches that a block of a CUDA kernel takes, several each, with edges; no map's gradient."""
    arguments = make((5, 6, 24), (13, 2, 2, 1), dtype, device, batch=1)
    arguments[1].requires_grad_(False)
    check(backend, arguments, (4, 4, 8), dtype, tuple(n for n in NAMES if n != "maps"))


@on_every_backend
def test_small_patches_of_queries_far_apart(backend, device):
    """So far apart that direct sums take the place of a table, forward and backward."""
    arguments = make((4, 6, 16), (5, 2, 2, 1), torch.bfloat16, device, batch=1)
    with torch.no_grad():
        arguments[NAMES.index("query_weight")] *= 40
    check(backend, arguments, (4, 4, 8), torch.bfloat16)


@on_every_backend
def test_a_gradient_that_is_not_finite_stops_at_hidden_units_that_are_off(backend, device):
    """NaN reaches x through the score where a unit passes, and nowhere else."""
    arguments = make((4, 4, 16), (4, 2, 1, 1), device=device)
    with torch.no_grad():
        arguments[NAMES.index("score_hidden_bias")][0] = -100
        arguments[NAMES.index("score_hidden_bias")][1] = 100
    with use_backend(backend):
        out, scores = rcu(*arguments, patch_size=(4, 4, 8))
        nan = torch.full_like(scores, torch.nan)
        grads = torch.autograd.grad((out, scores), arguments[:2], (torch.ones_like(out), nan))
    for grad in grads:
        assert torch.isfinite(grad[0]).all() and torch.isnan(grad[1]).all()


@on_every_backend
def test_a_batch_of_samples_is_its_samples(backend, device):
    """No sample sees another, in the small and in the large path."""
    for patch in (4, None):
        arguments = make((9, 11, 13), (16, 2, 1, 1), torch.float64, device, batch=3)
        with use_backend(backend):
            together = rcu(*arguments, patch_size=patch)
            for i in range(3):
                own = [a[i : i + 1] for a in arguments[:2]] + arguments[2:]
                own[NAMES.index("score_hidden_bias")] = arguments[NAMES.index("score_hidden_bias")][
                    i : i + 1
                ]
                alone = rcu(*own, patch_size=patch)
                for one, two in zip(alone, together, strict=True):
                    assert_close(two[i : i + 1], one, torch.float64, what=f"{patch} {i}")


@on_every_backend
def test_many_keys_keep_their_precision(backend, device):
    """Thousands of small weights that are added one by one to their sum lose half of its digits."""
    arguments = make((16, 16, 16), (4, 1, 1, 2), device=device, batch=1)
    exact = [argument.detach().double() for argument in arguments]
    with use_backend("reference"):
        expected, _ = rcu(*exact, patch_size=None)
    with use_backend(backend):
        found, _ = rcu(*arguments, patch_size=None)
    assert (found - expected).norm() / expected.norm() < 5e-7

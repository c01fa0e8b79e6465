# SPDX-License-Identifier: Apache-2.0
"""``gcu`` against its textbook form in float64, over sizes, values and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, assert_close, interpreted, runs_on, slow

from grcsf_kernels import gcu, use_backend

on_every_backend = pytest.mark.parametrize(("backend", "device"), runs_on("gcu"))


def textbook(skip, deep, skip_gate, deep_gate, compensation="dissimilarity", eps=1e-6):
    """The formulas of the paper with torch's own interpolation, in float64, under autograd."""
    skip, deep, skip_gate, deep_gate = (t.double() for t in (skip, deep, skip_gate, deep_gate))
    ones = [1] * (skip.ndim - 2)
    features = skip * skip_gate.reshape(*skip_gate.shape, *ones)
    up = F.interpolate(
        deep * deep_gate.reshape(*deep_gate.shape, *ones),
        size=skip.shape[2:],
        mode="bilinear" if skip.ndim == 4 else "trilinear",
        align_corners=False,
    )
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=eps)
    up_length = torch.linalg.vector_norm(up, dim=1, keepdim=True).clamp(min=eps)
    cosine = (features * up).sum(dim=1, keepdim=True) / (length * up_length)
    added = 1 - cosine if compensation == "dissimilarity" else cosine
    return skip * (1 + added), 1 - cosine


def make(space, deep_space, channels=3, batch=2, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape, dtype=wide):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return value.to(device, dtype).requires_grad_()

    return [
        random(batch, channels, *space, dtype=dtype),
        random(batch, channels, *deep_space, dtype=dtype),
        random(batch, channels),
        random(batch, channels),
    ]


def check(backend, arguments, dtype, **options):
    """Outputs and gradients of ``backend`` are those of the textbook form."""
    exact = [a.detach().double().requires_grad_() for a in arguments]
    expected = textbook(*exact, **options)
    with use_backend(backend):
        found = gcu(*arguments, **options)
        grads = [torch.randn_like(o) for o in found]
        found_grads = torch.autograd.grad(found, arguments, grads)
    expected_grads = torch.autograd.grad(expected, exact, [g.double() for g in grads])
    for name, one, two in zip(("compensated", "dissimilarity"), expected, found, strict=True):
        assert_close(two, one, dtype, what=name)
    names = ("skip", "deep", "skip_gate", "deep_gate")
    for name, one, two in zip(names, expected_grads, found_grads, strict=True):
        assert_close(two, one, dtype, gradient=True, what=f"gradient of {name}")


sizes = st.integers(1, 7)
spaces = st.one_of(
    st.tuples(st.tuples(sizes, sizes), st.tuples(sizes, sizes)),
    st.tuples(st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes, sizes)),
)


@on_every_backend
@settings(max_examples=40, deadline=None)
@given(
    spaces=spaces,
    channels=st.integers(2, 9),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    layout=st.sampled_from(list(LAYOUTS)),
    compensation=st.sampled_from(["dissimilarity", "similarity"]),
    seed=st.integers(0, 1000),
)
def test_is_the_textbook_form(
    backend, device, spaces, channels, batch, dtype, layout, compensation, seed
):
    if interpreted(backend) and seed % 4:
        return  # it is slow, and takes every fourth example
    arguments = make(*spaces, channels, batch, dtype, device, seed)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, dtype, compensation=compensation)


@on_every_backend
def test_one_channel_has_similarity_plus_or_minus_one(backend, device):
    """The cosine of numbers is their sign: no gradient goes through it but rounding."""
    arguments = make((5, 4), (3, 2), channels=1, device=device)
    with use_backend(backend):
        compensated, dissimilarity = gcu(*arguments)
        grads = torch.autograd.grad(compensated.sum(), arguments)
    assert_close(dissimilarity, textbook(*arguments)[1], torch.float64)
    assert_close(grads[0], 1 + dissimilarity, torch.float64, gradient=True)
    assert all(grad.abs().max() < 1e-12 for grad in grads[1:])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_a_network(backend, device, dtype):
    check(backend, make((17, 20, 19), (9, 10, 10), 16, 1, dtype, device), dtype)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("spaces", "channels"),
    [
        pytest.param(((5, 600), (3, 300)), 64, id="rows_in_blocks_doubled"),
        pytest.param(((4, 601), (2, 233)), 64, id="rows_in_blocks_of_odd_sizes"),
        pytest.param(((3, 4, 300), (2, 2, 151)), 130, id="rows_in_many_blocks"),
        pytest.param(((3, 4, 66), (2, 2, 33)), 64, id="rows_of_planes_doubled"),
        pytest.param(((2, 9, 34), (1, 5, 17)), 5, id="depth_2"),
        pytest.param(((3, 8, 32), (2, 4, 16)), 5, id="depth_3"),
        pytest.param(((4, 7, 18), (2, 4, 9)), 5, id="depth_4"),
        pytest.param(((5, 6, 21), (9, 11, 40)), 6, id="deep_is_larger"),
        pytest.param(((6, 300), (2, 701)), 40, id="deep_is_longer_in_rows_of_blocks"),
        pytest.param(((6, 7, 20), (6, 7, 20)), 4, id="equal_sizes"),
        pytest.param(((6, 7, 20), (1, 4, 1)), 4, id="deep_of_one_row"),
        pytest.param(((6, 7, 20), (3, 1, 10)), 4, id="deep_of_one_column"),
        pytest.param(((6, 7, 20), (1, 1, 1)), 4, id="deep_of_one_voxel"),
        pytest.param(((1, 1, 1), (4, 3, 5)), 4, id="one_voxel"),
    ],
)
def test_sizes_that_take_different_paths(backend, device, spaces, channels, dtype, layout):
    """Rows are cut into blocks where channels are many; batch 3, whose samples share no row."""
    arguments = make(*spaces, channels, 3, dtype, device)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, dtype)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_dtypes_in_blocks_of_rows(backend, device, dtype, layout):
    arguments = make((3, 599), (2, 300), 64, 1, dtype, device)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, dtype)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spaces", "channels"),
    [
        pytest.param(((6, 5, 32), (3, 4, 16)), 16, id="doubled"),
        pytest.param(((4, 16), (2, 8)), 272, id="doubled_of_many_channels"),
        pytest.param(((7, 3, 16), (2, 7, 5)), 24, id="other_ratios"),
    ],
)
def test_vectors_of_16_bytes(backend, device, spaces, channels, dtype, layout):
    """Rows, or channels, that are whole vectors in every dtype."""
    arguments = make(*spaces, channels, 2, dtype, device)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, dtype)


@on_every_backend
@pytest.mark.parametrize("spaces", [((70, 9, 65), (23, 4, 33)), ((301, 97), (100, 48))])
def test_positions_are_exact_at_large_odd_sizes(backend, device, spaces):
    """Interpolation positions rounded to float32 would show in the worst voxel."""
    arguments = make(*spaces, 8, 1, torch.float32, device)
    expected = textbook(*arguments)
    with use_backend(backend):
        found = gcu(*arguments)
    for one, two in zip(expected, found, strict=True):
        assert (two - one).abs().max() / one.abs().max() < 2e-6


@on_every_backend
@pytest.mark.parametrize("compensation", ["dissimilarity", "similarity"])
@pytest.mark.parametrize("spaces", [((3, 4, 2), (2, 5, 1)), ((5, 3), (2, 4))])
def test_gradcheck(backend, device, compensation, spaces):
    arguments = make(*spaces, channels=2, batch=1, device=device)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *a: gcu(*a, compensation=compensation),
            arguments,
            atol=1e-6,
            fast_mode=slow(backend),
        )


@on_every_backend
def test_zero_background_gives_no_nan(backend, device):
    """Air is exactly zero: similarity 0 there, and finite gradients."""
    arguments = make((4, 4, 4), (2, 2, 2), dtype=torch.float32, device=device)
    with torch.no_grad():
        arguments[0][..., 0] = 0
        arguments[1].zero_()
    with use_backend(backend):
        compensated, dissimilarity = gcu(*arguments)
        grads = torch.autograd.grad(compensated.sum() + dissimilarity.sum(), arguments)
    assert torch.equal(dissimilarity, torch.ones_like(dissimilarity))
    assert_close(compensated, 2 * arguments[0], torch.float32)
    assert all(torch.isfinite(grad).all() for grad in grads)


@on_every_backend
@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e5, 1e12])
def test_extreme_scales(backend, device, scale):
    """Far below eps the similarity fades, far above it does not depend on the scale."""
    arguments = make((4, 5, 3), (2, 3, 2), dtype=torch.float32, device=device)
    with torch.no_grad():
        arguments[0] *= scale
        arguments[1] *= scale
    with use_backend(backend):
        found = gcu(*arguments)
    for one, two in zip(textbook(*arguments), found, strict=True):
        assert_close(two, one, torch.float32)


@on_every_backend
def test_parallel_and_opposite_features(backend, device):
    skip = torch.randn(1, 6, 4, 4, 4, device=device)
    ones = torch.ones(1, 6, device=device)
    with use_backend(backend):
        _, same = gcu(skip, 3 * skip, ones, ones)
        compensated, opposite = gcu(skip, -skip, ones, ones)
    assert same.abs().max() < 1e-6
    assert (opposite - 2).abs().max() < 1e-6
    assert_close(compensated, 3 * skip, torch.float32)


@on_every_backend
def test_nan_stays_where_it_is(backend, device):
    skip, deep, skip_gate, deep_gate = make((4, 4), (4, 4), dtype=torch.float32, device=device)
    with torch.no_grad():
        skip[0, 0, 1, 2] = torch.nan
    with use_backend(backend):
        compensated, dissimilarity = gcu(skip, deep, skip_gate, deep_gate)
    assert torch.isnan(dissimilarity[0, 0, 1, 2])
    assert torch.isnan(dissimilarity).sum() == 1
    assert torch.isnan(compensated).sum() == skip.shape[1]


on_triton = pytest.mark.parametrize(
    ("backend", "device"), [run for run in runs_on("gcu") if run[0] == "triton"]
)


@on_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "spaces",
    [((12, 3, 4), (6, 2, 2)), ((11, 5), (4, 3)), ((3, 4, 5), (7, 3, 4)), ((7, 2, 33), (5, 1, 17))],
)
def test_triton_backward_in_slabs(backend, device, spaces, layout, monkeypatch):
    """Large volumes go in slabs of planes, with a ring of workspace. Here with the least ring."""
    from grcsf_kernels.triton.gcu import backward_kernels

    def least(skip, deep):
        return backward_kernels.longest_run(skip.shape[2], deep.shape[2])

    monkeypatch.setattr(backward_kernels, "ring_planes", least)
    arguments = make(*spaces, 5, 2, torch.float64, device)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, torch.float64)


@on_triton
def test_triton_slabs_hold_what_they_need(backend, device):
    """Every deep plane is complete when its turn comes, and its planes are still in the ring."""
    from grcsf_kernels.triton.gcu.backward_kernels import end_of, first_of, longest_run, slabs

    for depth in (1, 2, 3, 5, 8, 17):
        for deep in (1, 2, 3, 4, 9, 17, 40):
            for plane in range(deep):
                positions = [
                    min(max((2 * z + 1) * deep - depth, 0), 2 * depth * (deep - 1))
                    for z in range(depth)
                ]
                taken = [
                    z for z in range(depth) if abs(positions[z] - 2 * depth * plane) < 2 * depth
                ]
                if taken:
                    assert first_of(plane, depth, deep) == taken[0]
                    assert end_of(plane, depth, deep) == taken[-1] + 1
            for ring in range(longest_run(depth, deep), depth + 1):
                done = deep_done = 0
                for begin, end, deep_begin, deep_end in slabs(depth, deep, ring):
                    assert (begin, deep_begin) == (done, deep_done)
                    for plane in range(deep_begin, deep_end):
                        assert end_of(plane, depth, deep) <= end
                        assert first_of(plane, depth, deep) >= end - ring
                    done, deep_done = end, deep_end
                assert (done, deep_done) == (depth, deep)


@on_triton
@pytest.mark.parametrize("spaces", [((4, 3, 33), (2, 2, 17)), ((5, 7, 6), (3, 4, 3))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_with_64_bit_offsets(backend, device, spaces, layout, monkeypatch):
    """What runs beyond 2^31 elements, at a size that can be tested."""
    from grcsf_kernels.triton import launch

    monkeypatch.setattr(launch, "wide", lambda *tensors: True)
    arguments = make(*spaces, 5, 2, torch.float64, device)
    arguments[:2] = [LAYOUTS[layout](a.detach()).requires_grad_() for a in arguments[:2]]
    check(backend, arguments, torch.float64)


def error_cases():
    skip, deep = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)
    gate = torch.zeros(2, 3)
    return [
        ([None, deep, gate, gate], {}, TypeError, "skip is a NoneType"),
        ([skip, deep, gate, [1.0]], {}, TypeError, "deep_gate is a list"),
        ([skip.long(), deep, gate, gate], {}, TypeError, "skip is torch.int64"),
        ([skip, deep.double(), gate, gate], {}, TypeError, "deep is torch.float64, expected torch"),
        (
            [skip.half(), deep.half(), gate.half(), gate],
            {},
            TypeError,
            "skip_gate is torch.float16",
        ),
        ([skip[0], deep, gate, gate], {}, ValueError, r"skip has shape \(3, 4, 4\)"),
        ([skip, deep[:, :2], gate, gate], {}, ValueError, r"deep has shape \(2, 2, 2, 2\)"),
        ([skip, deep[..., None], gate, gate], {}, ValueError, "deep has shape"),
        ([skip, deep[..., :0], gate, gate], {}, ValueError, "at least one channel and one voxel"),
        ([skip, deep, gate[:1], gate], {}, ValueError, r"skip_gate has shape \(1, 3\), expected"),
        ([skip, deep, gate, gate[..., None]], {}, ValueError, "deep_gate has shape"),
        ([skip, deep.to("meta"), gate, gate], {}, ValueError, "deep is on meta, expected cpu"),
        ([skip, deep, gate, gate.to("meta")], {}, ValueError, "deep_gate is on meta"),
        ([skip, deep, gate, gate], {"compensation": "none"}, ValueError, "compensation is 'none'"),
        ([skip, deep, gate, gate], {"eps": 0.0}, ValueError, "eps is 0.0"),
    ]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), error_cases())
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"gcu: .*{message}"):
        gcu(*arguments, **options)

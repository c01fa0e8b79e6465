# SPDX-License-Identifier: Apache-2.0
"""``rcu`` against textbook cross-attention (unabsorbed, patch by patch) in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, assert_close, rcu, runs_on, slow

from grcsf_kernels import use_backend
from grcsf_kernels.ops.rcu import WEIGHTS
from grcsf_kernels.reference import rcu as reference_rcu

on_every_backend = pytest.mark.parametrize(("backend", "device"), runs_on("rcu"))
NAMES = ("x", "maps", *WEIGHTS)


def textbook(x, residual, heads, patch, scores):
    """Queries, keys and values per head; a full softmax in every patch; float64.

    ``heads``: per map a dict of the projections q [h, d, C], bq [h, d], k [h, d, c], bk [h, d],
    v [h, d, c], bv [h, d], o [C, h, d], bo [C].
    """
    w1, b1, w2, b2 = scores
    space = x.shape[2:]
    out = torch.empty_like(x)
    grid = [range(0, s, p) for s, p in zip(space, patch, strict=True)]
    found_scores = x.new_empty(x.shape[0], *(len(g) for g in grid))
    for sample in range(x.shape[0]):
        for cell, corner in zip(
            itertools.product(*(range(len(g)) for g in grid)), itertools.product(*grid), strict=True
        ):
            box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            voxels = x[(sample, slice(None), *box)].flatten(1).T  # [P, C]
            added = torch.zeros_like(voxels)
            means = [voxels.mean(dim=0)]
            for index, own in enumerate(heads):
                maps = residual[(sample, index, slice(None), *box)].flatten(1).T  # [P, c]
                means.append(maps.mean(dim=0))
                query = torch.einsum("pc,hdc->hpd", voxels, own["q"]) + own["bq"][:, None]
                key = torch.einsum("pc,hdc->hpd", maps, own["k"]) + own["bk"][:, None]
                value = torch.einsum("pc,hdc->hpd", maps, own["v"]) + own["bv"][:, None]
                logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
                attended = logits.softmax(dim=-1) @ value
                added = added + torch.einsum("hpd,chd->pc", attended, own["o"]) + own["bo"]
            hidden = (w1 @ torch.cat(means) + b1[sample]).relu()
            score = torch.sigmoid(w2 @ hidden + b2)
            found_scores[(sample, *cell)] = score
            result = voxels + score * added
            out[(sample, slice(None), *box)] = result.T.reshape(
                x.shape[1],
                *[
                    b.stop - b.start
                    for b in (
                        slice(s.start, min(s.stop, n)) for s, n in zip(box, space, strict=True)
                    )
                ],
            )
    return out, found_scores


def absorb(heads):
    """The absorbed weights of the operator from textbook projections."""
    scale = 1 / math.sqrt(heads[0]["q"].shape[1])
    query_weight = torch.stack([torch.einsum("hdk,hdc->hkc", w["k"], w["q"]) for w in heads])
    query_bias = torch.stack([torch.einsum("hdk,hd->hk", w["k"], w["bq"]) for w in heads])
    value_weight = torch.stack([torch.einsum("chd,hdk->chk", w["o"], w["v"]) for w in heads])
    value_bias = torch.stack([torch.einsum("chd,hd->c", w["o"], w["bv"]) + w["bo"] for w in heads])
    return query_weight * scale, query_bias * scale, value_weight, value_bias


def make_textbook(space, *, maps, map_channels, heads=2, channels=4, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dim, hidden = 3, 5
    projections = [
        {
            "q": random(heads, dim, channels),
            "bq": random(heads, dim),
            "k": random(heads, dim, map_channels),
            "bk": random(heads, dim),
            "v": random(heads, dim, map_channels),
            "bv": random(heads, dim),
            "o": random(channels, heads, dim),
            "bo": random(channels),
        }
        for _ in range(maps)
    ]
    scores = (
        random(hidden, channels + maps * map_channels),
        random(batch, hidden),
        random(hidden),
        random(),
    )
    x = random(batch, channels, *space)
    residual = random(batch, maps, map_channels, *space)
    return x, residual, projections, scores


sizes = st.integers(1, 7)
patches = st.integers(1, 4)
shapes = st.one_of(
    st.tuples(st.tuples(sizes, sizes), st.tuples(patches, patches)),
    st.tuples(st.tuples(sizes, sizes, sizes), st.tuples(patches, patches, patches)),
)


@on_every_backend
@settings(max_examples=30, deadline=None)
@given(
    shape=shapes,
    whole=st.booleans(),
    maps=st.integers(1, 3),
    map_channels=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_is_textbook_attention(
    backend, device, shape, whole, maps, map_channels, dtype, layout, seed
):
    if slow(backend) and seed % 4:
        return  # it is slow, and takes every fourth example
    space, patch = shape
    x, residual, heads, scores = make_textbook(
        space, maps=maps, map_channels=map_channels, seed=seed
    )
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    leaves += [w.requires_grad_() for own in heads for w in own.values()]
    leaves += [w.requires_grad_() for w in scores]
    expected = textbook(x, residual, heads, space if whole else patch, scores)

    arguments = [x, residual, *absorb(heads), *scores]
    arguments = [a.to(device, dtype) for a in arguments]
    arguments[0] = LAYOUTS[layout](arguments[0])
    with use_backend(backend):
        found = rcu(*arguments, patch_size=None if whole else patch)
        for name, one, two in zip(("out", "scores"), expected, found, strict=True):
            assert_close(two, one, dtype, what=name)
        if dtype != torch.float64:
            # Rounding the arguments moves gradients that nearly cancel; test_contract.py holds
            # float32 gradients to the same rounded arguments.
            return
        grads = [torch.randn_like(o) for o in found]
        found_grads = torch.autograd.grad(found, leaves, grads, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, leaves, [g.double().cpu() for g in grads])
    for leaf, one, two in zip(leaves, expected_grads, found_grads, strict=True):
        if two is None:  # the bias of the keys cancels in the softmax
            assert one.abs().max() < 1e-10 and any(leaf is own["bk"] for own in heads)
        else:
            # Gradients that cancel to nothing have no relative error to hold.
            if one.norm() > 1e-6:
                assert_close(two, one, dtype, gradient=True, what=f"gradient {tuple(leaf.shape)}")


def make(space, dtype=torch.float32, device="cpu", maps=2, heads=3, seed=0, scale=1.0, **options):
    x, residual, projections, scores = make_textbook(
        space, maps=maps, map_channels=options.pop("map_channels", 1), heads=heads, seed=seed
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    data = [x.to(device, dtype), (residual * scale).to(device, dtype)]
    weights = [w.to(device, wide) for w in (*absorb(projections), *scores)]
    return [a.detach().requires_grad_() for a in (*data, *weights)]


@on_every_backend
@pytest.mark.parametrize("map_channels", [1, 2])
@pytest.mark.parametrize(("space", "patch"), [((3, 2, 4), 2), ((3, 4), (2, 3)), ((2, 3), None)])
def test_gradcheck(backend, device, map_channels, space, patch):
    arguments = make(space, torch.float64, device, heads=2, map_channels=map_channels)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *a: rcu(*a, patch_size=patch), arguments, atol=1e-6, fast_mode=True
        )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [8, None])
def test_sizes_of_a_network(backend, device, dtype, patch):
    """Against the reference in float64 on the same rounded arguments; edge patches on each axis."""
    arguments = make((9, 11, 8), dtype, device)
    exact = [a.detach().double() for a in arguments]
    with use_backend("reference"):
        expected = rcu(*exact, patch_size=patch)
    with use_backend(backend):
        found = rcu(*arguments, patch_size=patch)
    for one, two in zip(expected, found, strict=True):
        assert_close(two, one, dtype)


@on_every_backend
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e2, 1e4])
def test_extreme_logits(backend, device, scale):
    """|a| |r| up to 1e4 and beyond, constant maps: finite, forward and backward."""
    arguments = make((6, 5, 4), torch.float32, device, scale=scale)
    exact = [a.detach().double() for a in arguments]
    with use_backend("reference"):
        expected = rcu(*exact, patch_size=4)
    with use_backend(backend):
        found = rcu(*arguments, patch_size=4)
        grads = torch.autograd.grad(found[0].sum() + found[1].sum(), arguments)
    assert all(torch.isfinite(grad).all() for grad in grads)
    # A logit of size 1e4 in float32 is known to 1e-3: the softmax can't be closer than that.
    error = (found[0].double() - expected[0]).norm() / expected[0].norm()
    assert error < (2e-6 if scale <= 1e2 else 2e-3)


@on_every_backend
def test_one_voxel_patches_attend_to_themselves(backend, device):
    arguments = make((3, 4, 5), torch.float64, device, maps=1)
    x, residual, _, _, value_weight, value_bias, *_ = arguments
    with use_backend(backend):
        out, scores = rcu(*arguments, patch_size=1)
    added = torch.einsum(
        "bdhw,xk->bxdhw", residual[:, 0, 0], value_weight[0].flatten(1).sum(dim=1, keepdim=True)
    ) + value_bias[0].view(-1, 1, 1, 1)
    assert scores.shape == (2, 3, 4, 5)
    assert_close(out, x + scores[:, None] * added, torch.float64)


@on_every_backend
def test_patches_are_independent_and_nan_stays_inside_its_own(backend, device):
    arguments = make((6, 6), torch.float32, device)
    with use_backend(backend):
        clean, _ = rcu(*arguments, patch_size=3)
        with torch.no_grad():
            arguments[1][0, 0, 0, 1, 1] = torch.nan
        dirty, _ = rcu(*arguments, patch_size=3)
    assert torch.isnan(dirty[0, :, :3, :3]).all()
    assert torch.equal(dirty[0, :, 3:], clean[0, :, 3:])
    assert torch.equal(dirty[1], clean[1])


@on_every_backend
def test_patch_larger_than_the_volume_is_the_whole_volume(backend, device):
    arguments = make((3, 4, 2), device=device)
    with use_backend(backend):
        whole, large = (rcu(*arguments, patch_size=p) for p in (None, 16))
    assert torch.equal(whole[0], large[0]) and torch.equal(whole[1], large[1])
    assert whole[1].shape == (2, 1, 1, 1)


def test_maps_without_a_channel_axis():
    arguments = make((4, 5))
    short = [arguments[0], arguments[1].squeeze(2), *arguments[2:]]
    for one, two in zip(rcu(*arguments, patch_size=3), rcu(*short, patch_size=3), strict=True):
        assert torch.equal(one, two)
    (grad,) = torch.autograd.grad(rcu(*short, patch_size=3)[0].sum(), short[1])
    assert grad.shape == short[1].shape


def test_chunks_do_not_change_the_result(monkeypatch):
    """Chunks of single queries and windows give what one chunk gives."""
    arguments = make((5, 6, 4), torch.float64)
    with use_backend("reference"):
        expected = rcu(*arguments, patch_size=3)
        expected_grads = torch.autograd.grad(expected[0].sum(), arguments)
        monkeypatch.setattr(reference_rcu, "_CHUNK", 1)
        found = rcu(*arguments, patch_size=3)
        found_grads = torch.autograd.grad(found[0].sum(), arguments)
    for one, two in zip((*expected, *expected_grads), (*found, *found_grads), strict=True):
        assert_close(two, one, torch.float64)


def error_cases():
    good = [a.detach() for a in make((4, 5))]

    def replace(name, value):
        arguments = list(good)
        arguments[NAMES.index(name)] = value
        return arguments

    def cut(name):
        return replace(name, good[NAMES.index(name)][..., :-1])

    return [
        (replace("maps", 3.0), 2, TypeError, "maps is a float"),
        (replace("x", good[0].int()), 2, TypeError, "x is torch.int32"),
        (replace("maps", good[1].double()), 2, TypeError, "maps is torch.float64"),
        (replace("query_bias", good[3].half()), 2, TypeError, "query_bias is torch.float16"),
        (replace("x", good[0][0, 0]), 2, ValueError, r"\[B, C, H, W\]"),
        (cut("maps"), 2, ValueError, "maps has shape"),
        (replace("maps", good[1][0, 0]), 2, ValueError, "maps has shape"),
        (replace("query_weight", good[2][0]), 2, ValueError, r"\[K, h, c, C\]"),
        (replace("score_hidden_weight", good[6][0]), 2, ValueError, r"\[m, C \+ K \* c\]"),
        *((cut(n), 2, ValueError, f"{n} has shape") for n in WEIGHTS[:-1]),
        (
            replace("score_output_bias", torch.zeros(1)),
            2,
            ValueError,
            "score_output_bias has shape",
        ),
        (replace("value_bias", good[5].to("meta")), 2, ValueError, "value_bias is on meta"),
        (good, 0, ValueError, "patch_size is 0"),
        (good, (2, 2, 2), ValueError, "each of the 2 spatial axes"),
        (good, 2.0, TypeError, "patch_size is 2.0"),
    ]


@pytest.mark.parametrize(("arguments", "patch_size", "error", "message"), error_cases())
def test_errors_name_the_argument(arguments, patch_size, error, message):
    with pytest.raises(error, match=f"rcu: .*{message}"):
        rcu(*arguments, patch_size=patch_size)

# SPDX-License-Identifier: Apache-2.0
"""``residual_map`` against its textbook form in float64 with an explicit unpatchify."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, assert_close, runs_on, slow

from grcsf_kernels import residual_map, use_backend

on_every_backend = pytest.mark.parametrize(("backend", "device"), runs_on("residual_map"))


def textbook(
    image, prediction, hidden, patch, normalized_target=False, average="residuals", eps=1e-6
):
    """Voxel by voxel: each token is written to its patch by explicit indices."""
    image, prediction = image.double(), prediction.double()
    draws, batch, _, _ = prediction.shape
    channels, space = image.shape[1], image.shape[2:]
    corners = list(itertools.product(*(range(0, s, p) for s, p in zip(space, patch, strict=True))))
    blocks = []
    for sample, (token, corner) in itertools.product(range(batch), enumerate(corners)):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        own = image[(sample, slice(None), *box)]
        residuals, shown = [], []
        for draw in range(draws):
            values = prediction[draw, sample, token].reshape(*patch, channels).movedim(-1, 0)
            if normalized_target:
                values = values * (own.var() + eps).sqrt() + own.mean()
            if hidden is None or hidden[draw, sample, token]:
                shown.append(values)
                residuals.append((own - values).abs())
        if not shown:
            block = torch.zeros_like(own)
        elif average == "residuals":
            block = torch.stack(residuals).mean(dim=0)
        else:
            block = (own - torch.stack(shown).mean(dim=0)).abs()
        blocks.append((sample, box, block))
    result = torch.zeros_like(image)
    for sample, box, block in blocks:
        mask = torch.zeros_like(image)
        mask[(sample, slice(None), *box)] = 1
        padded = torch.zeros_like(image).masked_scatter(mask.bool(), block)
        result = result + padded
    return result


def make(
    grid,
    patch,
    *,
    channels=1,
    draws=2,
    batch=1,
    dtype=torch.float64,
    prediction_dtype=None,
    device="cpu",
    hide=0.6,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    space = [g * p for g, p in zip(grid, patch, strict=True)]
    tokens, values = 1, channels
    for g, p in zip(grid, patch, strict=True):
        tokens, values = tokens * g, values * p

    def random(*shape, dtype):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return value.to(device, dtype).requires_grad_()

    image = random(batch, channels, *space, dtype=dtype)
    prediction = random(draws, batch, tokens, values, dtype=prediction_dtype or dtype)
    hidden = None
    if hide is not None:
        hidden = torch.rand(draws, batch, tokens, generator=generator).to(device) < hide
    return image, prediction, hidden


def check(backend, image, prediction, hidden, patch, **options):
    dtype = image.dtype
    exact = [t.detach().double().requires_grad_() for t in (image, prediction)]
    # The sum times 0 keeps both in the graph where no draw counts.
    expected = textbook(*exact, hidden, patch, **options) + 0 * (exact[0].sum() + exact[1].sum())
    with use_backend(backend):
        found = residual_map(image, prediction, hidden, patch_size=patch, **options)
        grad = torch.randn_like(found)
        found_grads = torch.autograd.grad(found, (image, prediction), grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    assert_close(found, expected, dtype, what="residual")
    for name, one, two, own in zip(
        ("image", "prediction"), expected_grads, found_grads, (dtype, prediction.dtype), strict=True
    ):
        assert_close(two, one, own, gradient=True, what=f"gradient of {name}")


small = st.integers(1, 3)
shapes = st.one_of(
    st.tuples(st.tuples(small, small), st.tuples(small, small)),
    st.tuples(st.tuples(small, small, small), st.tuples(small, small, small)),
)


@on_every_backend
@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    channels=st.integers(1, 3),
    draws=st.integers(1, 3),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    hide=st.sampled_from([None, 0.0, 0.5, 1.0]),
    normalized=st.booleans(),
    average=st.sampled_from(["residuals", "reconstructions"]),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_is_the_textbook_form(
    backend,
    device,
    shape,
    channels,
    draws,
    batch,
    dtype,
    hide,
    normalized,
    average,
    layout,
    seed,
):
    grid, patch = shape
    values = channels
    for p in patch:
        values *= p
    image, prediction, hidden = make(
        grid,
        patch,
        channels=channels,
        draws=draws,
        batch=batch,
        dtype=dtype,
        device=device,
        hide=hide,
        seed=seed,
    )
    image = LAYOUTS[layout](image.detach()).requires_grad_()
    # Two or three values have a variance that can be near 0, which amplifies rounding: a few
    # values more keep the float32 bar meaningful, and fewer are left to float64.
    if normalized and (values < 2 or (values < 8 and dtype == torch.float32)):
        normalized = False
    check(backend, image, prediction, hidden, patch, normalized_target=normalized, average=average)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", ["residuals", "reconstructions"])
@pytest.mark.parametrize("normalized", [False, True])
def test_every_dtype(backend, device, dtype, average, normalized):
    image, prediction, hidden = make((2, 1, 2), (4, 6, 8), draws=4, dtype=dtype, device=device)
    check(
        backend,
        image,
        prediction,
        hidden,
        (4, 6, 8),
        normalized_target=normalized,
        average=average,
    )


@on_every_backend
@pytest.mark.parametrize(
    ("dtype", "prediction_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("normalized", [False, True])
def test_prediction_of_lower_precision(backend, device, dtype, prediction_dtype, normalized):
    """Widened exactly: the residual holds the bar of the image's dtype."""
    image, prediction, hidden = make(
        (2, 3), (4, 5), dtype=dtype, prediction_dtype=prediction_dtype, device=device
    )
    check(backend, image, prediction, hidden, (4, 5), normalized_target=normalized)


@on_every_backend
@pytest.mark.parametrize("average", ["residuals", "reconstructions"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("hide", [None, 0.6])
def test_gradcheck(backend, device, average, normalized, hide):
    image, prediction, hidden = make((2, 1, 2), (2, 3, 1), channels=2, device=device, hide=hide)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda i, p: residual_map(
                i,
                p,
                hidden,
                patch_size=(2, 3, 1),
                normalized_target=normalized,
                average=average,
            ),
            (image, prediction),
            atol=1e-6,
            fast_mode=slow(backend),
        )


@on_every_backend
def test_token_order(backend, device):
    """Row-major grid, voxel slow, channel fast: a prediction that is the image leaves nothing."""
    image = torch.randn(1, 2, 4, 6, 9, device=device)
    tokens = []
    for d, h, w in itertools.product((0, 2), (0, 3), (0, 3, 6)):
        block = image[0, :, d : d + 2, h : h + 3, w : w + 3]
        tokens.append(
            [
                float(block[c, z, y, x])
                for z, y, x, c in itertools.product(range(2), range(3), range(3), range(2))
            ]
        )
    prediction = torch.tensor(tokens, device=device)[None, None]
    with use_backend(backend):
        residual = residual_map(image, prediction, patch_size=(2, 3, 3))
    assert torch.equal(residual, torch.zeros_like(image))


@on_every_backend
def test_never_hidden_patches_are_zero_even_beside_nan(backend, device):
    """A draw that does not count must not leak its values, were they NaN."""
    image, prediction, hidden = make((2, 2), (2, 2), draws=3, dtype=torch.float32, device=device)
    hidden[:, 0, 0] = False
    with torch.no_grad():
        prediction.masked_fill_(~hidden[..., None], torch.nan)
    for average in ("residuals", "reconstructions"):
        with use_backend(backend):
            residual = residual_map(
                image,
                prediction,
                hidden,
                patch_size=2,
                normalized_target=True,
                average=average,
            )
            grads = torch.autograd.grad(residual.sum(), (image, prediction))
        assert torch.equal(residual[..., :2, :2], torch.zeros_like(residual[..., :2, :2]))
        assert torch.isfinite(residual).all()
        assert torch.isfinite(grads[0]).all()
        assert (grads[1][~hidden] == 0).all()


@on_every_backend
def test_constant_patches_have_no_nan(backend, device):
    """Air: variance 0, so that the scale is sqrt(eps)."""
    image = torch.zeros(1, 1, 8, 8, device=device, requires_grad=True)
    prediction = torch.randn(2, 1, 4, 16, device=device, requires_grad=True)
    with use_backend(backend):
        residual = residual_map(image, prediction, patch_size=4, normalized_target=True)
        grads = torch.autograd.grad(residual.sum(), (image, prediction))
    expected = textbook(image, prediction, None, (4, 4), normalized_target=True)
    assert_close(residual, expected, torch.float32)
    assert all(torch.isfinite(grad).all() for grad in grads)


@on_every_backend
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_the_number_of_threads(backend, device, threads):
    image, prediction, hidden = make((3, 2, 5), (4, 4, 4), dtype=torch.float32, device=device)
    before = torch.get_num_threads()
    options = {"patch_size": 4, "normalized_target": True}
    with use_backend(backend):
        expected = residual_map(image, prediction, hidden, **options)
        expected_grad = torch.autograd.grad(expected.sum(), image)[0]
        torch.set_num_threads(threads)
        try:
            found = residual_map(image, prediction, hidden, **options)
            found_grad = torch.autograd.grad(found.sum(), image)[0]
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found, expected) and torch.equal(found_grad, expected_grad)


def test_int_patch_size_is_for_every_axis():
    image, prediction, hidden = make((2, 2, 2), (2, 2, 2))
    one = residual_map(image, prediction, hidden, patch_size=2)
    two = residual_map(image, prediction, hidden, patch_size=(2, 2, 2))
    assert torch.equal(one, two)


def error_cases():
    image, prediction, hidden = (t.detach() for t in make((2, 2), (2, 2), dtype=torch.float32))
    good = {"patch_size": 2}
    return [
        ([image.tolist(), prediction], good, TypeError, "image is a list"),
        ([image, prediction, [True]], good, TypeError, "hidden is a list"),
        ([image.int(), prediction], good, TypeError, "image is torch.int32"),
        ([image, prediction.double()], good, TypeError, "prediction is torch.float64"),
        ([image.bfloat16(), prediction.half()], good, TypeError, "prediction is torch.float16"),
        ([image, prediction.long()], good, TypeError, "prediction is torch.int64"),
        ([image, prediction, hidden.float()], good, TypeError, "hidden is torch.float32"),
        ([image[0, 0], prediction], good, ValueError, "image has shape"),
        ([image, prediction[0]], good, ValueError, "prediction has shape"),
        ([image, prediction[:0]], good, ValueError, "N >= 1"),
        ([image, prediction[..., :3]], good, ValueError, r"expected \(2, 1, 4, 4\)"),
        ([image, prediction, hidden[:1]], good, ValueError, "hidden has shape"),
        ([image, prediction.to("meta")], good, ValueError, "prediction is on meta"),
        ([image[..., :3], prediction], good, ValueError, "divisible by patch_size"),
        ([image, prediction], {"patch_size": (2, 2, 2)}, ValueError, "each of the 2 spatial axes"),
        ([image, prediction], {"patch_size": 0}, ValueError, "patch_size is 0"),
        ([image, prediction], {"patch_size": "2"}, TypeError, "patch_size is '2'"),
        ([image, prediction], good | {"average": "mean"}, ValueError, "average is 'mean'"),
        ([image, prediction], good | {"eps": -1.0}, ValueError, "eps is -1.0"),
        (
            [image, prediction],
            {"patch_size": 1, "normalized_target": True},
            ValueError,
            "one value per patch",
        ),
    ]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), error_cases())
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"residual_map: .*{message}"):
        residual_map(*arguments, **options)

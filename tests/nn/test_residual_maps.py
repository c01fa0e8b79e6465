# SPDX-License-Identifier: Apache-2.0
"""``nn.ResidualMaps`` and its masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.nn import ResidualMaps, complementary_masks, random_masks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def autoencoder(**options):
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_dim": 24, "decoder_heads": 2}
    return MaskedAutoencoder(4, **(small | options))


@settings(max_examples=30, deadline=None)
@given(
    patches=st.integers(2, 60),
    ratio=st.floats(0.05, 0.95),
    batch=st.integers(1, 3),
    draws=st.integers(1, 4),
)
def test_random_masks_hide_the_same_number(patches, ratio, batch, draws):
    hidden = random_masks(batch, patches, ratio, draws, generator())
    assert hidden.shape == (draws, batch, patches) and hidden.dtype == torch.bool
    counts = hidden.sum(dim=2)
    assert (counts == counts[0, 0]).all() and 1 <= counts[0, 0] < patches
    assert abs(int(counts[0, 0]) - ratio * patches) <= 1


def test_random_masks_differ_between_draws_and_samples():
    hidden = random_masks(2, 64, 0.5, 2, generator()).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in hidden}) == 4


@pytest.mark.parametrize(("ratio", "size", "times"), [(0.5, 2, 1), (0.75, 4, 3), (0.6, 5, 3)])
@pytest.mark.parametrize("patches", [16, 27, 61])
def test_complementary_rounds_hide_every_patch_equally_often(ratio, size, times, patches):
    hidden = complementary_masks(3, patches, ratio, 2 * size, generator())
    assert hidden.shape == (2 * size, 3, patches)
    for start in (0, size):
        assert (hidden[start : start + size].sum(dim=0) == times).all()
    counts = hidden.sum(dim=2)
    assert (counts == counts[:, :1]).all()  # equal over the batch in each draw
    assert (counts - ratio * patches).abs().max() <= times
    assert not torch.equal(hidden[:size], hidden[size:])


@pytest.mark.parametrize("masks", [random_masks, complementary_masks])
def test_masks_follow_from_the_seed(masks):
    one, two, other = (masks(2, 30, 0.75, 4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_masks(1, 8, 1.0, 1), "mask_ratio is 1.0"),
        (lambda: random_masks(1, 8, 0.5, 0), "draws is 0"),
        (lambda: random_masks(1, 1, 0.5, 1), "num_patches is 1"),
        (lambda: complementary_masks(1, 8, 0.75, 6), "expected a multiple of 4"),
        (lambda: complementary_masks(1, 8, 0.123456, 4), "denominator of at most 16"),
        (lambda: complementary_masks(1, 3, 0.75, 4), "num_patches is 3, expected at least 4"),
        (lambda: ResidualMaps([autoencoder()]), "one autoencoder for each ratio"),
        (lambda: ResidualMaps([autoencoder()], (0.5,), masking="all"), "masking is 'all'"),
        (lambda: ResidualMaps([autoencoder()], (0.5,), draws=0), "draws is 0"),
        (
            lambda: ResidualMaps([autoencoder()], (0.75,), draws=2, masking="complementary"),
            "expected a multiple of 4",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA generator needs a CUDA device")
def test_a_cuda_generator_is_refused():
    with pytest.raises(ValueError, match="expected a CPU generator"):
        random_masks(1, 8, 0.5, 1, torch.Generator("cuda"))


@pytest.mark.parametrize("masking", ["random", "complementary"])
@pytest.mark.parametrize("normalized", [True, False])
def test_is_the_mean_over_hidden_draws(masking, normalized):
    """Against patches taken out, reconstructed and put back by hand."""
    model = autoencoder(normalized_target=normalized, in_channels=2)
    module = ResidualMaps([model], (0.5,), draws=2, masking=masking)
    image = torch.randn(2, 2, 8, 4, 8)
    found = module(image, generator(3))

    masks = {"random": random_masks, "complementary": complementary_masks}[masking]
    hidden = masks(2, 4, 0.5, 2, generator(3))
    expected = torch.zeros(2, 8, 4, 8)
    corners = [(d, 0, w) for d in (0, 4) for w in (0, 4)]
    for sample in range(2):
        for token, (d, h, w) in enumerate(corners):
            patch = image[sample, :, d : d + 4, h : h + 4, w : w + 4]
            residuals = []
            for draw in range(2):
                if hidden[draw, sample, token]:
                    shown = model.reconstruct(image, hidden[draw])[sample, token].view(4, 4, 4, 2)
                    shown = shown.movedim(-1, 0)
                    if normalized:
                        shown = shown * (patch.var() + 1e-6).sqrt() + patch.mean()
                    residuals.append((patch - shown).abs())
            if residuals:
                mean = torch.stack(residuals).mean(0).mean(0)
                expected[sample, d : d + 4, h : h + 4, w : w + 4] = mean
    low, high = expected.flatten(1).min(1).values, expected.flatten(1).max(1).values
    expected = (expected - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_maps_of_any_size_are_in_0_to_1():
    module = ResidualMaps([autoencoder(), autoencoder(embed_dim=12)])
    image = torch.randn(2, 1, 9, 7, 10)
    maps = module(image, generator())
    assert maps.shape == (2, 2, 9, 7, 10)
    for sample in maps.flatten(2):
        assert torch.equal(sample.min(dim=1).values, torch.zeros(2))
        assert torch.equal(sample.max(dim=1).values, torch.ones(2))
    assert torch.equal(maps, module(image, generator()))
    assert not torch.equal(maps, module(image, generator(1)))


def test_images_are_2d_as_well():
    module = ResidualMaps([autoencoder(spatial_dims=2)], (0.5,))
    assert module(torch.randn(1, 1, 10, 12)).shape == (1, 1, 10, 12)


def test_autoencoders_are_frozen():
    model = autoencoder()
    module = ResidualMaps([model], (0.5,))
    module.train()
    assert not model.training and not any(p.requires_grad for p in module.parameters())
    image = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    assert not module(image).requires_grad


def test_a_constant_map_is_zero_and_not_nan():
    class Perfect(torch.nn.Module):
        patch_size, normalized_target = (4, 4, 4), False

        def reconstruct(self, image, hidden):
            return torch.zeros(image.shape[0], hidden.shape[1], 64)

    maps = ResidualMaps([Perfect()], (0.5,), draws=4, masking="complementary")
    assert torch.equal(maps(torch.zeros(1, 1, 8, 8, 8)), torch.zeros(1, 1, 8, 8, 8))

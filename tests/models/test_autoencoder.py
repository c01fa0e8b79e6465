# SPDX-License-Identifier: Apache-2.0
"""``models.MaskedAutoencoder``."""

from __future__ import annotations

import pytest
import torch

from grcsf_kernels import residual_map
from grcsf_kernels.models import MaskedAutoencoder
from grcsf_kernels.models.autoencoder import sincos_positions
from grcsf_kernels.nn import random_masks


def make(**options):
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_dim": 24, "decoder_heads": 2}
    return MaskedAutoencoder(**({"patch_size": 4} | small | options))


@pytest.mark.parametrize(
    ("dims", "space", "patch"), [(3, (8, 12, 4), 4), (3, (6, 4, 10), (3, 2, 5)), (2, (8, 12), 4)]
)
def test_forward(dims, space, patch):
    model = make(spatial_dims=dims, patch_size=patch, in_channels=2)
    image = torch.randn(2, 2, *space)
    loss, prediction, hidden = model(image, generator=torch.Generator().manual_seed(1))
    tokens = model.patchify(image)
    assert prediction.shape == tokens.shape and hidden.shape == tokens.shape[:2]
    assert (hidden.sum(dim=1) == round(0.75 * tokens.shape[1])).all()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tokens_are_in_the_order_of_the_operator():
    model = make(in_channels=3, patch_size=(2, 4, 3))
    image = torch.randn(2, 3, 4, 8, 6)
    residual = residual_map(image, model.patchify(image)[None], patch_size=(2, 4, 3))
    assert torch.equal(residual, torch.zeros_like(image))


def test_hidden_patches_are_not_seen():
    """What is hidden changes nothing in the prediction; what is shown does."""
    model = make().eval()
    image = torch.randn(1, 1, 8, 8, 8)
    hidden = random_masks(1, 8, 0.5, 1, torch.Generator().manual_seed(0))[0]
    tokens = model.patchify(image)
    before = model.reconstruct(image, hidden)

    def change(which):
        changed = torch.where(which[..., None], tokens + 5, tokens)
        blocks = changed.view(2, 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return model.reconstruct(blocks.reshape(1, 1, 8, 8, 8), hidden)

    assert torch.equal(change(hidden), before)
    assert not torch.allclose(change(~hidden), before)


def test_loss_is_over_hidden_patches_only():
    model = make(normalized_target=False)
    image = torch.randn(1, 1, 8, 8, 8)
    hidden = torch.tensor([[True, False, False, True, False, False, False, True]])
    loss, prediction, _ = model(image, hidden)
    error = (prediction - model.patchify(image)).square().mean(-1)
    torch.testing.assert_close(loss, error[hidden].mean())


def test_loss_of_a_normalized_target():
    model = make()
    image = 50 + 10 * torch.randn(1, 1, 8, 8, 8)
    hidden = torch.arange(8)[None] < 4
    loss, prediction, _ = model(image, hidden)
    tokens = model.patchify(image)
    target = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, (prediction - target).square().mean(-1)[hidden].mean())


def test_encoder_runs_on_visible_tokens_only():
    model = make()
    image = torch.randn(2, 1, 8, 8, 8)
    hidden = random_masks(2, 8, 0.75, 1)[0]
    assert model.encode(image, hidden).shape == (2, 2, 24)
    assert model.encode(image).shape == (2, 8, 24)


def test_learns_an_image():
    torch.manual_seed(0)
    axes = torch.meshgrid(*[torch.linspace(-2, 2, 8)] * 3, indexing="ij")
    image = torch.sin(sum(axes))[None, None]
    model = make(mask_ratio=0.5, normalized_target=False, embed_dim=48, decoder_dim=48)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(300):
        loss, _, _ = model(image, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_attention_begins_with_the_neighbors():
    """Where tokens are their positions alone, each is most like those beside it."""
    model = make(embed_dim=48, decoder_dim=48)
    positions = sincos_positions((6, 6, 6), 48, model.position_base, torch.device("cpu"))
    for block in (model.encoder[0], model.decoder[0]):
        query, key, _ = block.attention.qkv(block.norm1(positions)).chunk(3, dim=-1)
        weights = sum(
            (q @ k.T / 24**0.5).softmax(-1)
            for q, k in zip(query.split(24, -1), key.split(24, -1), strict=True)
        )
        places = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
        distances = torch.cdist(places, places)
        looked = (weights * distances).sum(-1) / weights.sum(-1)
        assert looked.mean() < 0.5 * distances.mean()


@pytest.mark.parametrize("base", [10.0, 10000.0])
def test_positions_tell_all_patches_apart(base):
    positions = sincos_positions((3, 4, 5), 26, base, torch.device("cpu"))
    assert positions.shape == (60, 26)
    distances = torch.cdist(positions, positions) + torch.eye(60)
    assert distances.min() > 0.1


def test_config_rebuilds_the_model():
    model = make(in_channels=2)
    again = MaskedAutoencoder(**model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(spatial_dims=4), "spatial_dims is 4"),
        (lambda: make(embed_dim=25), "embed_dim is 25"),
        (lambda: make(position_base=0), "position_base is 0"),
        (lambda: make(patch_size=(4, 4)), "patch_size is"),
        (lambda: make()(torch.zeros(1, 1, 9, 8, 8)), "image has shape"),
        (lambda: make()(torch.zeros(1, 2, 8, 8, 8)), "image has shape"),
        (
            lambda: make()(torch.zeros(2, 1, 8, 8, 8), torch.eye(2, 8).cumsum(0) > 0),
            "expected the same number in each sample",
        ),
        (lambda: make()(torch.zeros(2, 1, 8, 8, 8), torch.zeros(1, 8) > 0), "hidden has shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

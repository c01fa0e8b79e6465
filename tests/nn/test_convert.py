# SPDX-License-Identifier: Apache-2.0
"""``nn.convert``: units with copied weights against attention as one writes it in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer, ResidualSELayer
from torch import nn

from grcsf_kernels.nn import RCU, SqueezeExcitation, convert

PATCH, HEADS, WIDTH, CHANNELS = 4, 2, 6, 8


def patches(tensor):
    """[B, C, D, H, W] in patches of PATCH voxels: [patches, voxels, C]."""
    blocks = tensor
    for axis in (2, 3, 4):
        blocks = blocks.unfold(axis, PATCH, PATCH)
    return blocks.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4, 6).flatten(0, 3)


def unit(num_maps=1, map_channels=1, head_dim=WIDTH // HEADS):
    """An RCU whose scores are 1 and whose maps weigh 1: what it adds is attention alone."""
    module = RCU(
        CHANNELS,
        num_maps,
        map_channels=map_channels,
        num_heads=HEADS,
        head_dim=head_dim,
        patch_size=PATCH,
    ).double()
    nn.init.ones_(module.map_weight)
    nn.init.zeros_(module.score_output.weight)
    nn.init.constant_(module.score_output.bias, 100.0)
    return module


def added(module, x, residual):
    """What the unit adds to x, patch by patch."""
    return patches(module(x, residual) - x).detach()


def data(map_channels=1, num_maps=1):
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 8, 4, 4, dtype=torch.float64)
    return x, torch.rand(2, num_maps, map_channels, 8, 4, 4, dtype=torch.float64)


def eager(query, key, value, output, x, residual, scale=None):
    """Every projection on the volume, then attention within each patch."""

    def heads(tensor):
        return patches(tensor).unflatten(2, (HEADS, -1)).transpose(1, 2)

    q, k, v = heads(query(x)), heads(key(residual)), heads(value(residual))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    if output is None:
        return attended.detach()
    weight, bias = output.weight.flatten(1), output.bias
    return F.linear(attended, weight, bias).detach()


@pytest.mark.parametrize("map_channels", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_one_voxel(map_channels, bias):
    """One set of layers for each map, with the key's bias, which makes no difference."""
    x, residual = data(map_channels, num_maps=2)
    module, expected = unit(2, map_channels), 0
    for index in range(2):
        query = nn.Conv3d(CHANNELS, WIDTH, 1, bias=bias).double()
        key = nn.Conv3d(map_channels, WIDTH, 1, bias=bias).double()
        value = nn.Conv3d(map_channels, WIDTH, 1, bias=bias).double()
        output = nn.Conv3d(WIDTH, CHANNELS, 1, bias=bias).double()
        layers = {"query": query, "key": key, "value": value, "output": output}
        convert.load_projections(module, index, **layers)
        expected = expected + eager(query, key, value, output, x, residual[:, index])
    torch.testing.assert_close(added(module, x, residual), expected, rtol=1e-9, atol=1e-11)


def test_the_bias_of_the_keys_drops_out():
    x, residual = data()
    query, output = nn.Conv3d(CHANNELS, WIDTH, 1), nn.Conv3d(WIDTH, CHANNELS, 1)
    key, value = nn.Conv3d(1, WIDTH, 1), nn.Conv3d(1, WIDTH, 1)
    layers = [layer.double() for layer in (query, key, value, output)]
    one = eager(*layers, x, residual[:, 0])
    nn.init.constant_(key.bias, 7.0)
    torch.testing.assert_close(eager(*layers, x, residual[:, 0]), one, rtol=1e-9, atol=1e-11)


def test_combined_layers_other_scales_and_no_output_layer():
    x, residual = data(CHANNELS)
    qkv = nn.Conv3d(CHANNELS, 3 * CHANNELS, 1).double()
    query, key, value = convert.split_projection(qkv)
    module = unit(1, CHANNELS, head_dim=CHANNELS // HEADS)
    convert.load_projections(module, 0, query=query, key=key, value=value, scale=0.7)

    def part(index):
        return lambda tensor: qkv(tensor).chunk(3, dim=1)[index]

    expected = eager(part(0), part(1), part(2), None, x, residual[:, 0], scale=0.7)
    torch.testing.assert_close(added(module, x, residual), expected, rtol=1e-9, atol=1e-11)
    both = nn.Linear(1, 2 * WIDTH, bias=False)
    key, value = convert.split_projection(both, parts=2)
    assert torch.equal(torch.cat([key[0], value[0]]), both.weight) and key[1] is None


@pytest.mark.parametrize("map_channels", [1, CHANNELS])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(map_channels, bias):
    """Separate weights where the map has channels of its own, one in_proj where it has not."""
    x, residual = data(map_channels)
    attention = nn.MultiheadAttention(
        CHANNELS, HEADS, bias=bias, kdim=map_channels, vdim=map_channels, batch_first=True
    ).double()
    if bias:
        nn.init.normal_(attention.in_proj_bias)
    assert (attention.in_proj_weight is None) == (map_channels == 1)
    module = unit(1, map_channels, head_dim=CHANNELS // HEADS)
    convert.load_attention(module, 0, attention)
    maps = patches(residual[:, 0])
    expected = attention(patches(x), maps, maps, need_weights=False)[0].detach()
    torch.testing.assert_close(added(module, x, residual), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["ChannelSELayer", "pair", "convolutions"])
def test_gates(form):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 5)
    gate = SqueezeExcitation(8, reduction=2)
    layer = ChannelSELayer(3, 8, r=2)
    layers = {"ChannelSELayer": layer, "pair": [layer.fc[0], layer.fc[2]]}
    squeeze, excite = nn.Conv3d(8, 4, 1), nn.Conv3d(4, 8, 1, bias=False)
    layers["convolutions"] = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid())
    convert.load_gate(gate, layers[form])
    if form == "convolutions":
        expected = layers[form](x.mean(dim=(2, 3, 4), keepdim=True)).flatten(1)
    else:
        expected = (layer(x) / x).mean(dim=(2, 3, 4))
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)


def layers(**changes):
    every = {
        "query": nn.Linear(CHANNELS, WIDTH),
        "key": nn.Linear(1, WIDTH),
        "value": nn.Linear(1, WIDTH),
        "output": nn.Linear(WIDTH, CHANNELS),
    }
    return every | changes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert.load_projections(unit(), 1, **layers()), "index is 1, expected a map"),
        (
            lambda: convert.load_projections(unit(), 0, **layers(key=nn.Linear(2, WIDTH))),
            r"key has a weight \(6, 2\).*expected \(6, 1\)",
        ),
        (
            lambda: convert.load_projections(unit(), 0, **layers(query=nn.Conv3d(8, 6, 3))),
            r"query has a weight \(6, 8, 3, 3, 3\), expected \[out, in, 1",
        ),
        (
            lambda: convert.load_projections(
                unit(), 0, **layers(query=nn.Conv3d(8, 6, 1, groups=2))
            ),
            "2 groups",
        ),
        (lambda: convert.load_projections(unit(), 0, **layers(value=nn.ReLU())), "value is a ReLU"),
        (
            lambda: convert.load_projections(unit(), 0, **layers(output=None)),
            r"output has a weight \(6, 6\).*expected \(8, 6\)",
        ),
        (lambda: convert.split_projection(nn.Linear(1, 7)), "7 rows, expected a multiple of 3"),
        (
            lambda: convert.load_attention(unit(), 0, nn.MultiheadAttention(8, 4)),
            "4 heads, expected 2",
        ),
        (
            lambda: convert.load_attention(unit(), 0, nn.MultiheadAttention(8, 2, dropout=0.1)),
            "dropout",
        ),
        (
            lambda: convert.load_gate(SqueezeExcitation(8, 2), ResidualSELayer(3, 8, r=2)),
            "adds its input",
        ),
        (
            lambda: convert.load_gate(SqueezeExcitation(8, 4), ChannelSELayer(3, 8, r=2)),
            r"weight \(4, 8\), expected \(2, 8\)",
        ),
        (
            lambda: convert.load_gate(
                SqueezeExcitation(8, 2), [nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8)]
            ),
            "GELU.*expected two layers around a ReLU",
        ),
    ],
)
def test_errors_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_error_leaves_the_unit_as_it_was():
    module = unit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="output has"):
        convert.load_projections(module, 0, **layers(output=nn.Linear(WIDTH, 3)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

# SPDX-License-Identifier: Apache-2.0
"""Modules made without memory: on the meta device, then ``to_empty`` and ``reset_parameters``."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet, UNet

from grcsf_kernels.models import GRCSF, MaskedAutoencoder, ResidualUNet
from grcsf_kernels.nn import GCU, RCU, CompensatedUNet, SqueezeExcitation

MODULES = {
    "SqueezeExcitation": lambda: SqueezeExcitation(32, 4),
    "GCU": lambda: GCU(32, 8),
    "RCU": lambda: RCU(32, context_channels=3),
    "ResidualUNet": lambda: ResidualUNet(channels=(4, 8, 8, 8), deep_supervision=True),
    "GRCSF": lambda: GRCSF(channels=(4, 8, 8)),
    "MaskedAutoencoder": lambda: MaskedAutoencoder(
        4, embed_dim=48, depth=2, num_heads=2, decoder_dim=48, decoder_depth=1, decoder_heads=2
    ),
    "DynUNet": lambda: CompensatedUNet(DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2] * 2)),
    "SegResNet": lambda: CompensatedUNet(SegResNet(3, 8)),
    "UNet": lambda: CompensatedUNet(UNet(3, 1, 2, (4, 8, 8), (2, 2), norm="batch")),
}
# Bits that depend on the order in which parts are reset, which is the caller's.
OF_ANOTHER_ORDER = {"MaskedAutoencoder", "DynUNet", "SegResNet", "UNet"}


def made_anew(make, order):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    torch.manual_seed(0)
    for part in order(module.modules()):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module.state_dict()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("order", [list, lambda parts: list(parts)[::-1]], ids=["down", "up"])
def test_a_module_that_is_reset_is_one_that_was_made(name, order):
    """Parents before their parts, as FSDP does it, or after them, as ``apply`` does it."""
    torch.manual_seed(0)
    expected = MODULES[name]().state_dict()
    found = made_anew(MODULES[name], order)
    assert list(found) == list(expected)
    for key, value in found.items():
        assert torch.isfinite(value).all(), key
        if order is list and name not in OF_ANOTHER_ORDER:
            assert torch.equal(value, expected[key]), key
        if "network." in key:  # of MONAI's own nothing is promised
            continue
        if value.numel() > 1 and expected[key].unique().numel() == 1:
            assert torch.equal(value, expected[key]), key
        elif value.numel() >= 64:
            ratio = value.std() / expected[key].std()
            assert 0.6 < ratio < 1.6, key
        # Rows that begin equal: the keys and queries of the autoencoder.
        if key.endswith("qkv.weight"):
            query, keys, _ = value.chunk(3)
            assert torch.equal(query, keys)


@pytest.mark.parametrize("space", [(4, 6, 5), (4, 6)])
def test_modules_work_on_the_meta_device(space):
    skip = torch.empty(2, 8, *space, device="meta", requires_grad=True)
    deep = torch.empty(2, 4, *(2 for _ in space), device="meta")
    maps = torch.empty(2, 2, *space, device="meta")
    gcu, rcu = GCU(8, 4).to("meta"), RCU(8, patch_size=2).to("meta")
    out = rcu(gcu(skip, deep), maps)
    assert out.shape == skip.shape and out.device.type == "meta"
    out.sum().backward()
    assert skip.grad.shape == skip.shape
    assert all(p.grad.device.type == "meta" for p in (*gcu.parameters(), *rcu.parameters()))


def test_decompositions_keep_a_dynamic_space():
    class Units(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gcu, self.rcu = GCU(4, 8), RCU(4, patch_size=2)

        def forward(self, skip, deep, maps):
            return self.rcu(self.gcu(skip, deep), maps)

    def inputs(height, width):
        return (
            torch.randn(1, 4, 2 * height, 2 * width),
            torch.randn(1, 8, height, width),
            torch.rand(1, 2, 2 * height, 2 * width),
        )

    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    whole, half = {2: 2 * h, 3: 2 * w}, {2: h, 3: w}
    units = Units()
    program = torch.export.export(units, inputs(4, 6), dynamic_shapes=(whole, half, whole))
    decomposed = program.run_decompositions().module()
    for size in ((5, 3), (2, 9)):
        arguments = inputs(*size)
        torch.testing.assert_close(decomposed(*arguments), units(*arguments))

# SPDX-License-Identifier: Apache-2.0
"""``nn.CompensatedUNet`` around the real networks of MONAI and nnU-Net, in 2D and 3D."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from dynamic_network_architectures.architectures.unet import (
    PlainConvUNet,
    ResidualEncoderUNet,
    ResidualUNet,
)
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.networks.nets import (
    AttentionUnet,
    BasicUNet,
    DynUNet,
    SegResNet,
    SegResNetVAE,
    UNet,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grcsf_kernels.nn import CompensatedUNet

# MONAI 1.6 added it.
CheckpointUNet = pytest.importorskip("monai.networks.nets.unet").__dict__.get("CheckpointUNet")


def unet(dims=3, cls=UNet, **options):
    return cls(dims, 1, 2, channels=(4, 6, 8, 8), strides=(1, 2, 2), **options)


def dynunet(dims=3, **options):
    kernels, strides = [3, 3, 3, 3], [1, 2, (2,) * (dims - 1) + (1,), 2]
    return DynUNet(dims, 1, 2, kernels, strides, strides[1:], filters=(4, 6, 8, 8), **options)


def segresnet(dims=3, **options):
    norm = ("GROUP", {"num_groups": 2})
    return SegResNet(dims, 4, 1, 2, norm=norm, blocks_down=(1, 1, 2), blocks_up=(1, 1), **options)


def nnunet(dims=3, cls=ResidualEncoderUNet, deep_supervision=True):
    blocks = "n_blocks_per_stage" if cls is ResidualEncoderUNet else "n_conv_per_stage"
    return cls(
        input_channels=1,
        n_stages=3,
        features_per_stage=(4, 6, 8),
        conv_op=nn.Conv3d if dims == 3 else nn.Conv2d,
        kernel_sizes=3,
        strides=(1, 2, 2),
        num_classes=2,
        n_conv_per_stage_decoder=1,
        norm_op=nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
        **{blocks: 1},
    )


NETWORKS = {
    "UNet": unet,
    "UNet, residual units": lambda dims=3: unet(dims, num_res_units=2),
    "DynUNet": dynunet,
    "DynUNet, supervised": lambda dims=3: dynunet(
        dims, deep_supervision=True, deep_supr_num=2, res_block=True
    ),
    "SegResNet": segresnet,
    "SegResNet, no head": lambda dims=3: segresnet(dims, use_conv_final=False),
    "ResidualEncoderUNet": nnunet,
    "PlainConvUNet": lambda dims=3: nnunet(dims, PlainConvUNet, False),
}
if CheckpointUNet is not None:
    NETWORKS["CheckpointUNet"] = lambda dims=3: unet(dims, CheckpointUNet)


@pytest.fixture(params=list(NETWORKS))
def make(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]


def inputs(dims=3, batch=2):
    """Image and maps: what the wrapper takes; and the image alone."""
    torch.manual_seed(1)
    space = (16, 8, 24)[:dims]
    x = torch.cat([torch.randn(batch, 1, *space), torch.rand(batch, 2, *space)], dim=1)
    return x, x[:, :1].clone()


def flat(output):
    """Deep supervision gives a list; everything else one tensor."""
    return list(output) if isinstance(output, (list, tuple)) else [output]


def neutral(model):
    """Switches units off by their parameters: closed gates, and maps that weigh nothing."""
    for unit in model.gcu:
        nn.init.zeros_(unit.deep_gate.excite.weight)
        nn.init.constant_(unit.deep_gate.excite.bias, -1e4)
    for unit in model.rcu.values():
        nn.init.zeros_(unit.map_weight)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_neutral_units_leave_the_network_as_it_was(make, dims, training):
    """A closed gate makes the cosine 0, and a similarity of 0 compensates nothing."""
    network = make(dims).train(training)
    x, image = inputs(dims)
    expected = flat(network(image))
    bare = CompensatedUNet(network, 2, use_gcu=False, rcu_levels=())
    model = CompensatedUNet(network, 2, patch_size=4, compensation="similarity").train(training)
    assert len(model.gcu) == len(model._adapter.encoded(network)) - 1
    active = flat(model(x))
    neutral(model)
    for plain, without, off, on in zip(
        expected, flat(bare(x)), flat(model(x)), active, strict=True
    ):
        assert torch.equal(without, plain)
        assert torch.equal(off, plain)
        assert on.shape == plain.shape and not torch.allclose(on, plain)


def test_every_parameter_learns(make):
    """Through both units: data-parallel training would stop on a parameter without a gradient."""
    network = make()
    model = CompensatedUNet(network, 2, rcu_levels=(0, 1), patch_size=4)
    plain = {n for n, p in network.named_parameters() if p.requires_grad}
    sum(out.square().mean() for out in flat(model(inputs()[0]))).backward()
    used = {n for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    sum(out.square().mean() for out in flat(network(inputs()[1]))).backward()
    # Heads and biases that the network alone does not train are not trained here either.
    assert used == {n for n in plain if network.get_parameter(n).grad is not None}
    for name, parameter in [*model.gcu.named_parameters(), *model.rcu.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_maps_matter_and_reach_only_the_rcus(make):
    model = CompensatedUNet(make(), 2, patch_size=4).eval()
    x, image = inputs()
    other = torch.cat([image, torch.rand_like(x[:, 1:])], dim=1)
    assert not torch.equal(flat(model(x))[0], flat(model(other))[0])
    unused = CompensatedUNet(model.network, 2, rcu_levels=()).eval()
    assert torch.equal(flat(unused(x))[0], flat(unused(other))[0])
    alone = CompensatedUNet(model.network, 0, rcu_levels=()).eval()
    alone.load_state_dict(unused.state_dict())
    assert torch.equal(flat(unused(x))[0], flat(alone(image))[0])


def test_weights_of_the_network_load_and_come_back(make):
    plain, x = make(), inputs()[0]
    model = CompensatedUNet(make(), 2, patch_size=4)
    model.network.load_state_dict(plain.state_dict())
    again = CompensatedUNet(make(), 2, patch_size=4)
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model.eval())
    for one, two, three in zip(flat(model(x)), flat(again.eval()(x)), flat(copied(x)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert all(name.startswith(("network.", "gcu.", "rcu.")) for name in model.state_dict())
    plain.load_state_dict(model.network.state_dict())


@pytest.mark.parametrize("name", ["UNet", "DynUNet, supervised", "SegResNet", "PlainConvUNet"])
def test_is_captured_in_one_graph(name):
    """By torch.compile; tests/models and tests/ops compile the units and their gradients."""
    model, (x, _) = CompensatedUNet(NETWORKS[name](), 2, patch_size=4), inputs(batch=1)
    torch._dynamo.reset()
    found = flat(torch.compile(model, fullgraph=True, backend="eager")(x))
    for one, two in zip(found, flat(model(x)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_windows_slide_over_image_and_maps():
    """MONAI's inferer needs to know of nothing; one window that fits gives the model's output."""
    model = CompensatedUNet(unet(), 2, patch_size=4).eval()
    x, _ = inputs(batch=1)
    with torch.no_grad():
        whole = sliding_window_inference(MetaTensor(x), x.shape[2:], 1, model)
        torch.testing.assert_close(whole.as_tensor(), model(x), rtol=1e-5, atol=1e-6)
        windows = sliding_window_inference(x, (8, 8, 8), 2, model, overlap=0.5, mode="gaussian")
    assert windows.shape == (1, 2, *x.shape[2:]) and torch.isfinite(windows).all()


def test_trains_on_the_tensors_that_monai_loads():
    """MetaTensor is a subclass of Tensor, and every feature and gradient becomes one."""
    model, (x, _) = CompensatedUNet(unet(), 2, patch_size=4), inputs()
    for image in (x, MetaTensor(x)):
        model.zero_grad()
        model(image).square().mean().backward()
        grads = torch.cat([p.grad.as_subclass(torch.Tensor).flatten() for p in model.parameters()])
        if image is x:
            expected = grads
    torch.testing.assert_close(grads, expected)


def test_activation_checkpointing_and_data_parallel_give_the_same_gradients(tmp_path):
    model, (x, _) = CompensatedUNet(unet(), 2, patch_size=4), inputs()

    def gradients(call):
        model.zero_grad()
        call(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(model)
    recomputed = gradients(
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    )
    torch.testing.assert_close(recomputed, expected)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(model)
        # The second call is the one that complains of parameters that the first left out.
        gradients(parallel)
        torch.testing.assert_close(gradients(parallel), expected)
        # Before its process group: where it goes last, gloo's thread may wait for Python's lock,
        # which is held by who waits for that thread.
        del parallel
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = CompensatedUNet(unet(), 2, patch_size=4)
    with torch.autocast("cpu", dtype=dtype):
        out = model(inputs()[0])
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class _OtherForward(UNet):
    def forward(self, x):
        return super().forward(x).sigmoid()


class _Same(UNet):
    pass


def test_a_subclass_with_its_networks_forward_is_that_network():
    assert CompensatedUNet(unet(cls=_Same), 2)(inputs()[0]).shape == (2, 2, 16, 8, 24)


def dna_residual_unet():
    return ResidualUNet(
        1, 2, (4, 6), nn.Conv3d, 3, (1, 2), 1, 2, 1, nonlin=nn.ReLU, norm_op=nn.InstanceNorm3d
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CompensatedUNet(AttentionUnet(3, 1, 2, (4, 8), (2,))),
            "is a monai.networks.nets.attentionunet.AttentionUnet, expected one of monai",
        ),
        (lambda: CompensatedUNet(BasicUNet(features=(4,) * 6)), "BasicUNet, expected one of"),
        (lambda: CompensatedUNet(nn.Conv3d(1, 1, 1)), "torch.nn.modules.conv.Conv3d, expected"),
        (lambda: CompensatedUNet(dna_residual_unet()), "unet.ResidualUNet, expected one of"),
        (
            lambda: CompensatedUNet(SegResNetVAE((16, 16, 16))),
            "SegResNetVAE with a forward of its own, expected that of SegResNet",
        ),
        (lambda: CompensatedUNet(unet(cls=_OtherForward)), "with a forward of its own"),
        (lambda: CompensatedUNet(CompensatedUNet(unet())), "CompensatedUNet, expected one of"),
        (lambda: CompensatedUNet(unet(), rcu_levels=(2,)), r"rcu_levels is \(2,\).*0 to 1"),
        (
            lambda: CompensatedUNet(UNet(3, 1, 2, channels=(4, 8), strides=(2,))),
            "none: the decoder has no feature",
        ),
        (lambda: CompensatedUNet(unet(), 0), "num_maps is 0, expected at least 1"),
        (lambda: CompensatedUNet(unet(), -1, rcu_levels=()), "num_maps is -1"),
        (lambda: CompensatedUNet(unet())(torch.zeros(1, 2, 8, 8, 8)), r"x has shape \(1, 2, 8"),
        (lambda: CompensatedUNet(unet())(torch.zeros(1, 3, 8)), r"x has shape \(1, 3, 8\)"),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()

# SPDX-License-Identifier: Apache-2.0
"""The units' layers behave as linear layers do, whatever was done to them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from attention import textbook as rcu_textbook
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from grcsf_kernels.nn import GCU, RCU, SqueezeExcitation, convert
from grcsf_kernels.nn.layers import affine

LAYERS = ("query.0", "key.1", "value.0", "output.1", "score_hidden", "score_output")
GATES = ("skip_gate.squeeze", "skip_gate.excite", "deep_gate.squeeze", "deep_gate.excite")


class LoRA(nn.Module):
    """An adapter as peft has it: the layer it stands for, and a product of low rank beside it."""

    def __init__(self, base, rank=2, dropout=0.0):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False).to(base.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)))


class Symmetrized(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(0) / 2


def quiet(change):
    def run(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return change(layer) or layer

    return run


def _adapted_in_place(layer):
    scale = nn.Parameter(torch.full((layer.out_features,), 1.5, dtype=layer.weight.dtype))
    layer.register_parameter("scale", scale)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * layer.scale


CHANGES = {
    "LoRA": LoRA,
    "prune": quiet(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "prune the bias": quiet(lambda layer: prune.random_unstructured(layer, "bias", 1)),
    "weight_norm": quiet(torch.nn.utils.weight_norm),
    "parametrized weight_norm": quiet(parametrizations.weight_norm),
    "spectral_norm": quiet(torch.nn.utils.spectral_norm),
    "parametrized spectral_norm": quiet(parametrizations.spectral_norm),
    "parametrization": quiet(
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetrized())
    ),
    "forward hook": quiet(
        lambda layer: layer.register_forward_hook(lambda m, i, out: out * 0.5) and None
    ),
    "forward pre-hook": quiet(
        lambda layer: layer.register_forward_pre_hook(lambda m, i: (i[0] * 3,)) and None
    ),
    "a forward of its own": quiet(_adapted_in_place),
}


def replace(module, name, change):
    parent, _, child = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(owner, nn.ModuleList):
        owner[int(child)] = change(owner[int(child)])
    else:
        setattr(owner, child, change(getattr(owner, child)))


def rcu_case(context=3):
    torch.manual_seed(0)
    module = RCU(4, num_heads=2, head_dim=3, patch_size=2, context_channels=context).double()
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 4, 3), (2, 2, 4, 3), (2, context)]
    return module, [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def step(module, call, inputs, optimizer):
    optimizer.zero_grad()
    outputs = call(*inputs)
    sum(o.square().mean() for o in outputs).backward()
    optimizer.step()
    return [o.detach() for o in outputs]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_changed_layer_counts_as_it_is_called_and_learns(change, name):
    """As in attention that calls its layers on every voxel; then three steps of training."""
    if change == "prune the bias" and name == "key.1":
        name = "value.1"  # keys have no bias
    module, inputs = rcu_case()
    before = module(*inputs)
    replace(module, name, CHANGES[change])
    if change == "LoRA":
        nn.init.normal_(module.get_submodule(name).lora_B.weight)
    if "spectral" in change:  # in training each call is an iteration, and textbook attention calls
        module.eval()  # once a patch
    found = module(*inputs, return_scores=True)
    if "weight_norm" not in change:  # which begins with the weights that there were
        assert not torch.allclose(found[0], before, rtol=1e-6)
    expected = rcu_textbook(module, *inputs)
    trained = [p for p in module.parameters() if p.requires_grad]
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
    pairs = [
        torch.autograd.grad(sum(o.square().mean() for o in o), trained, allow_unused=True)
        for o in (expected, found)
    ]
    for one, two in zip(*pairs, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(two, one, rtol=1e-7, atol=1e-10)
    # What the layer's own parameters learn: also in a second step.
    own = [p for p in module.get_submodule(name).parameters() if p.requires_grad]
    old = [p.detach().clone() for p in own]
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    for _ in range(3):
        step(module, lambda *a: module(*a, return_scores=True), inputs, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(own, old, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_the_gates_call_their_layers(change):
    torch.manual_seed(0)
    module = GCU(4, 6, reduction=2).double()
    skip = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    deep = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    before = module(skip, deep)
    for name in GATES:
        replace(module, name, CHANGES[change])
        layer = module.get_submodule(name)
        if change == "LoRA":
            nn.init.normal_(layer.lora_B.weight)
    module.eval()
    gate = module.skip_gate
    means = skip.flatten(2).mean(2)
    expected = torch.sigmoid(gate.excite(gate.squeeze(means).relu()))
    torch.testing.assert_close(gate(skip), expected)
    if "weight_norm" not in change:
        assert not torch.allclose(module(skip, deep), before, rtol=1e-6)
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    for _ in range(2):
        step(module, lambda *a: module(*a, return_map=True), (skip, deep), optimizer)


def test_hooks_on_the_layers_are_called():
    module, inputs = rcu_case()
    gcu = GCU(4, 6, reduction=2)
    called = []
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    layers += [(n, m) for n, m in gcu.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)]
    for name, layer in layers:
        layer.register_forward_hook(lambda m, i, o, name=name: called.append(name))
    module(*inputs)
    gcu(torch.randn(1, 4, 4, 4), torch.randn(1, 6, 2, 2))
    assert sorted(called) == sorted(name for name, _ in layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamically_quantized_weights_count():
    """The weights of the integers; activations, which are never called upon, stay in float."""
    module, inputs = rcu_case()
    module.float()
    inputs = [i.float() for i in inputs]
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    expected = copy.deepcopy(module)
    for name in ("query.0", "query.1", "key.0", "key.1", "value.0", "value.1", "output.0"):
        weight = quantized.get_submodule(name).weight().dequantize()
        expected.get_submodule(name).weight.data.copy_(weight)
    for name in ("output.1", "score_hidden", "score_output"):
        weight = quantized.get_submodule(name).weight().dequantize()
        expected.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(quantized(*inputs), expected(*inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(quantized(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
    gate = SqueezeExcitation(8, 2)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(
        torch.ao.quantization.quantize_dynamic(gate, {nn.Linear})(x), gate(x), rtol=0, atol=2e-2
    )


def test_what_is_not_affine_is_refused_by_the_layers_name():
    module, inputs = rcu_case()
    module.query[1] = LoRA(module.query[1], dropout=0.1)
    with pytest.raises(RuntimeError, match=r"RCU: query\.1 has dropout \(p=0.1\) in training"):
        module(*inputs)
    module.eval()(*inputs)

    module, inputs = rcu_case()
    module.score_hidden.register_forward_hook(lambda m, i, out: out.relu())
    with pytest.raises(RuntimeError, match="RCU: score_hidden is not affine in its input"):
        module(*inputs)

    module, inputs = rcu_case()
    module.value[0].register_forward_hook(lambda m, i, out: out + torch.rand_like(out))
    with pytest.raises(RuntimeError, match=r"RCU: value\.0 is not affine"):
        module(*inputs)

    module, inputs = rcu_case()
    module.key[0].register_forward_hook(lambda m, i, out: (out, out))
    with pytest.raises(TypeError, match=r"RCU: key\.0 gives a tuple"):
        module(*inputs)

    module, inputs = rcu_case()
    module.key[0] = torch.ao.nn.quantized.Linear(1, 6)
    with pytest.raises(TypeError, match=r"RCU: key\.0 is a Linear of torch.ao.nn.quantized"):
        module(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_called_layer_has_the_weights_of_a_plain_one(dtype):
    layer = nn.Linear(5, 7).to(dtype)
    like = torch.empty(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = affine("layer", layer, 5, like)
    layer.register_forward_pre_hook(lambda m, i: None)
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    with torch.autocast("cpu", enabled=False):
        for one, two in zip(expected, affine("layer", layer, 5, like), strict=True):
            assert one.dtype == two.dtype == like.dtype
            torch.testing.assert_close(two, one, **tolerance)


def test_a_changed_layer_under_autocast_and_compile_is_the_same():
    module, inputs = rcu_case()
    module.float()
    inputs = [i.float() for i in inputs]
    for name in LAYERS:
        replace(module, name, LoRA)
        nn.init.normal_(module.get_submodule(name).lora_B.weight)
    expected = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = module.absorbed(*inputs[::2])
    for one, two in zip(module.absorbed(*inputs[::2]), weights, strict=True):
        assert torch.equal(one, two)


def test_conversion_reads_what_a_layer_computes_and_writes_no_derived_weight():
    module, inputs = rcu_case()
    source, other = rcu_case()[0], rcu_case()[0]
    prune.l1_unstructured(source.query[0], "weight", 0.5)
    source.query[0].weight_orig.data.mul_(2)  # as an optimizer's step: weight is stale now
    parts = {n: getattr(source, n)[0] for n in ("query", "key", "value", "output")}
    convert.load_projections(module, 0, **parts)
    for name in ("key", "value", "output"):
        getattr(other, name)[0].load_state_dict(getattr(source, name)[0].state_dict())
    other.query[0].weight.data.copy_(source.query[0].weight_orig * source.query[0].weight_mask)
    other.query[0].bias.data.copy_(source.query[0].bias)
    torch.testing.assert_close(module(*inputs), other(*inputs))
    with pytest.raises(ValueError, match=r"query\.0 of the unit has an adapter, a parametriz"):
        convert.load_projections(source, 0, **parts)
    gate = SqueezeExcitation(4, 2)
    parametrizations.weight_norm(gate.squeeze)
    with pytest.raises(ValueError, match="load_gate: a layer of the unit has an adapter"):
        convert.load_gate(gate, [nn.Linear(4, 2), nn.Linear(2, 4)])

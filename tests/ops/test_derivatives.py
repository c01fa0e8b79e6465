# SPDX-License-Identifier: Apache-2.0
"""Derivatives other than ``backward()``: right, or refused by the operator's name; never zero."""

from __future__ import annotations

import pytest
import torch
from support import assert_close, example
from torch.autograd import forward_ad

import grcsf_kernels
from grcsf_kernels.dispatch import OPERATORS
from grcsf_kernels.nn import GCU, RCU

for_every_operator = pytest.mark.parametrize("operator", OPERATORS)
on_both = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.fixture
def case(operator, backend):
    """The loss as a function of the floating arguments, those arguments, and a tangent of each."""
    call = example(operator, dtype=torch.float64)
    floating = [i for i, a in enumerate(call.arguments) if a.is_floating_point()]
    generator = torch.Generator().manual_seed(5)

    def loss(*tensors):
        arguments = list(call.arguments)
        for position, tensor in zip(floating, tensors, strict=True):
            arguments[position] = tensor
        found = call.function(*arguments, **call.options)
        return sum(o.square().mean() for o in (found if isinstance(found, tuple) else (found,)))

    at = tuple(call.arguments[i] for i in floating)
    tangents = tuple(torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in at)
    with grcsf_kernels.use_backend(backend):
        yield loss, at, tangents


def reverse(loss, at):
    leaves = [a.detach().clone().requires_grad_() for a in at]
    return torch.autograd.grad(loss(*leaves), leaves)


def _dual(loss, at, tangents, requires_grad):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(a.clone().requires_grad_(requires_grad), t)
            for a, t in zip(at, tangents, strict=True)
        ]
        loss(*duals)


FORWARD_MODES = {
    "jvp": lambda loss, at, t: torch.func.jvp(loss, at, t),
    "jacfwd": lambda loss, at, t: torch.func.jacfwd(loss)(*at),
    "linearize": lambda loss, at, t: torch.func.linearize(loss, *at),
    "hessian": lambda loss, at, t: torch.func.hessian(loss)(*at),
    "jvp of grad": lambda loss, at, t: torch.func.jvp(torch.func.grad(loss), at, t),
    "grad of jvp": lambda loss, at, t: torch.func.grad(
        lambda x: torch.func.jvp(lambda y: loss(y, *at[1:]), (x,), t[:1])[1]
    )(at[0]),
    "vmap of jvp": lambda loss, at, t: torch.func.vmap(
        lambda x: torch.func.jvp(lambda y: loss(y, *at[1:]), (x,), t[:1])[1]
    )(at[0][None]),
    "dual tensors": lambda loss, at, t: _dual(loss, at, t, requires_grad=False),
    "dual tensors that require gradients": lambda loss, at, t: _dual(loss, at, t, True),
}


@for_every_operator
@on_both
@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_mode_is_refused_by_the_operators_name(operator, case, mode):
    with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode derivatives"):
        FORWARD_MODES[mode](*case)


@for_every_operator
@on_both
def test_one_tangent_among_plain_tensors_is_refused_too(operator, case):
    loss, at, tangents = case
    for position in range(len(at)):
        with forward_ad.dual_level():
            mixed = list(at)
            mixed[position] = forward_ad.make_dual(at[position], tangents[position])
            with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode"):
                loss(*mixed)


@for_every_operator
@on_both
def test_without_a_tangent_a_dual_level_changes_nothing(case):
    loss, at, _ = case
    with forward_ad.dual_level():
        assert torch.equal(loss(*at), loss(*at))
        found = reverse(loss, at)
    for one, two in zip(reverse(loss, at), found, strict=True):
        assert torch.equal(one, two)


@for_every_operator
@on_both
def test_functional_reverse_mode_is_that_of_backward(case):
    loss, at, _ = case
    every = tuple(range(len(at)))
    expected = reverse(loss, at)
    pull = torch.func.vjp(loss, *at)[1]
    for found in (
        torch.func.grad(loss, argnums=every)(*at),
        pull(torch.ones((), dtype=torch.float64)),
        torch.func.jacrev(loss, argnums=every)(*at),
        torch.autograd.functional.jacobian(loss, at, vectorize=True),
        torch.autograd.functional.vjp(loss, at)[1],
    ):
        for one, two in zip(expected, found, strict=True):
            assert_close(two, one, torch.float64, gradient=True)


@for_every_operator
@on_both
def test_vmap_and_gradients_of_samples_are_those_of_a_loop(case, capfd):
    loss, at, _ = case
    stacked = tuple(torch.stack([a, a * 1.1, a * 0.9]) for a in at)
    samples = [tuple(s[i] for s in stacked) for i in range(3)]
    torch.testing.assert_close(
        torch.func.vmap(loss)(*stacked), torch.stack([loss(*s) for s in samples])
    )
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(len(at)))))(*stacked)
    expected = [torch.stack(g) for g in zip(*(reverse(loss, s) for s in samples), strict=True)]
    for one, two in zip(expected, gradients, strict=True):
        assert_close(two, one, torch.float64, gradient=True)
    # One argument alone, along another axis.
    alone = torch.func.vmap(lambda x: loss(x, *at[1:]), in_dims=2)(stacked[0].movedim(0, 2))
    torch.testing.assert_close(alone, torch.stack([loss(s[0], *at[1:]) for s in samples]))
    assert "performance drop" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="vmap over an axis of size 0"):
        torch.func.vmap(loss)(*(s[:0] for s in stacked))


@for_every_operator
@on_both
def test_second_derivatives_are_refused_by_the_operators_name(operator, case):
    loss, at, _ = case
    refused = pytest.raises(NotImplementedError, match=f"^{operator}: double backward")
    with refused:
        torch.func.grad(lambda *a: torch.func.grad(loss)(*a).sum())(*at)
    with refused:
        torch.func.jacrev(torch.func.jacrev(loss))(*at)
    leaves = [a.clone().requires_grad_() for a in at]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for gradient in first:
        with refused:
            gradient.sum().backward(retain_graph=True)


def _modules():
    torch.manual_seed(0)
    maps = torch.rand(2, 2, 4, 4, 4, dtype=torch.float64)
    deep = torch.randn(2, 5, 2, 2, 2, dtype=torch.float64)
    return {
        "gcu": (GCU(4, 5, reduction=2).double(), deep),
        "rcu": (RCU(4, num_heads=2, head_dim=3, patch_size=2).double(), maps),
    }


@pytest.mark.parametrize("operator", ["gcu", "rcu"])
@on_both
def test_modules_differentiate_by_functional_call(operator, backend):
    module, other = _modules()[operator]
    x = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, x, other):
        found = torch.func.functional_call(module, parameters, (x[None], other[None]))
        return found.square().mean()

    with grcsf_kernels.use_backend(backend):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, other)
        for sample in range(2):
            value = loss(parameters, x[sample], other[sample])
            expected = torch.autograd.grad(value, list(parameters.values()))
            for name, gradient in zip(parameters, expected, strict=True):
                torch.testing.assert_close(
                    each[name][sample], gradient, rtol=1e-9, atol=1e-12, msg=name
                )
        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode"):
            torch.func.jvp(lambda p: loss(p, x[0], other[0]), (parameters,), (tangents,))

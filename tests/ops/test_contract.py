# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator on every backend: the contract with torch."""

from __future__ import annotations

import pytest
import torch
from support import ALL_RUNS, DTYPES, LAYOUTS, assert_close, example
from torch.library import opcheck

import grcsf_kernels
from grcsf_kernels.dispatch import OPERATORS

on_every_run = pytest.mark.parametrize(("operator", "backend", "device"), ALL_RUNS)
for_every_operator = pytest.mark.parametrize("operator", OPERATORS)


def gradients(outputs, inputs, rounded_as=None):
    """Gradients for random incoming ones, rounded to the dtypes of ``rounded_as``."""
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(like.dtype).to(o)
        for o, like in zip(outputs, rounded_as or outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, inputs, grads)


@pytest.fixture
def poisoned():
    """Uninitialized memory is NaN inside the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_every_run
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("space", [(4, 6, 2), (6, 4)])
def test_opcheck(operator, backend, device, layout, space):
    case = example(operator, layout=layout, space=space, device=device, dtype=torch.float64)
    case.requires_grad()
    # A slice of a leaf is no leaf: detach, so that the operator's own arguments are.
    case.arguments = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in case.arguments
    ]
    with grcsf_kernels.use_backend(backend):
        opcheck(case.op, tuple(case.arguments), case.options)


@on_every_run
def test_opcheck_of_the_backward(operator, backend, device):
    case = example(operator, device=device)
    outputs = case()
    backward = getattr(torch.ops.grcsf, f"{operator}_backward").default
    needs = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in case.arguments]
    if operator == "gcu":
        options = ("dissimilarity", 1e-6, needs)
    elif operator == "rcu":
        outputs, options = (*outputs, outputs[1]), (case.options["patch_size"], needs)
    else:
        options = (case.options["patch_size"], True, "residuals", 1e-6, needs[:2])
    with grcsf_kernels.use_backend(backend):
        opcheck(
            backward,
            (*outputs, *case.arguments, *options),
            test_utils=("test_schema", "test_faketensor"),
        )


@on_every_run
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_values(operator, backend, device, layout, poisoned):
    """Whatever the strides of the data, values and gradients are those of contiguous data."""
    plain = example(operator, device=device).requires_grad()
    other = example(operator, device=device, layout=layout)
    other.requires_grad()
    with grcsf_kernels.use_backend(backend):
        expected, found = plain(), other()
        for one, two in zip(expected, found, strict=True):
            assert_close(two, one, torch.float32, what=layout)
        pairs = zip(
            gradients(expected, plain.tensors()), gradients(found, other.tensors()), strict=True
        )
        for one, two in pairs:
            assert_close(two, one, torch.float32, gradient=True, what=layout)


@on_every_run
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced"])
@pytest.mark.parametrize("space", [None, (4, 6)])
def test_output_keeps_the_layout(operator, backend, device, layout, space):
    case = example(operator, device=device, layout=layout, space=space)
    with grcsf_kernels.use_backend(backend):
        output = case()[0]
    last = torch.channels_last if space else torch.channels_last_3d
    expected = torch.contiguous_format if layout == "contiguous" else last
    assert output.is_contiguous(memory_format=expected)


@on_every_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(operator, backend, device, dtype, poisoned):
    """Against the same rounded arguments in float64; outputs and gradients keep their dtypes."""
    case = example(operator, dtype=dtype, device=device).requires_grad()
    exact = example(operator, dtype=dtype, device=device)
    exact.arguments = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in exact.arguments
    ]
    exact.requires_grad()
    with grcsf_kernels.use_backend(backend):
        outputs = case()
        found = gradients(outputs, case.tensors())
    with grcsf_kernels.use_backend("reference"):
        exact_outputs = exact()
        expected = gradients(exact_outputs, exact.tensors(), rounded_as=outputs)
    assert outputs[0].dtype == dtype
    for one, two in zip(exact_outputs, outputs, strict=True):
        assert_close(two, one, dtype, what="output")
    for argument, one, two in zip(case.tensors(), expected, found, strict=True):
        assert two.dtype == argument.dtype
        assert_close(two, one, dtype, gradient=True, what="gradient")


@on_every_run
def test_same_bits_every_run(operator, backend, device):
    case = example(operator, device=device, seed=3).requires_grad()
    with grcsf_kernels.use_backend(backend):
        outputs = case()
        first = [*outputs, *gradients(outputs, case.tensors())]
        for _ in range(3):
            outputs = case()
            again = [*outputs, *gradients(outputs, case.tensors())]
            assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


@on_every_run
def test_expanded_and_strided_incoming_gradients(operator, backend, device):
    """sum() sends a gradient of stride 0, torch.cat slices: both must be read right."""
    case = example(operator, device=device, dtype=torch.float64).requires_grad()
    with grcsf_kernels.use_backend(backend):
        summed = torch.autograd.grad(case()[0].sum(), case.tensors())
        joined = torch.cat([case()[0], torch.zeros_like(case()[0])], dim=1)
        weights = torch.ones_like(joined)
        sliced = torch.autograd.grad(joined, case.tensors(), weights)
        output = case()[0]
        dense = torch.autograd.grad(output, case.tensors(), torch.ones_like(output))
    for one, two, three in zip(dense, summed, sliced, strict=True):
        assert_close(two, one, torch.float64, what="sum")
        assert_close(three, one, torch.float64, what="cat")


@on_every_run
def test_only_the_gradients_that_are_asked_for(operator, backend, device):
    """Each gradient alone is the same as with all others."""
    case = example(operator, device=device, dtype=torch.float64).requires_grad()
    with grcsf_kernels.use_backend(backend):
        together = gradients(case(), case.tensors())
        for index, argument in enumerate(case.tensors()):
            for tensor in case.tensors():
                tensor.requires_grad_(False)
            argument.requires_grad_()
            (alone,) = gradients(case(), [argument])
            assert_close(alone, together[index], torch.float64, what=f"argument {index}")


@on_every_run
def test_empty_batch(operator, backend, device):
    case = example(operator, device=device, batch=0).requires_grad()
    with grcsf_kernels.use_backend(backend):
        outputs = case()
        grads = gradients(outputs, case.tensors())
    assert outputs[0].shape == case.arguments[0].shape
    assert all(g.shape == a.shape for g, a in zip(grads, case.tensors(), strict=True))
    assert all(torch.isfinite(g).all() for g in grads)


@for_every_operator
def test_double_backward_is_refused(operator):
    case = example(operator, dtype=torch.float64).requires_grad()
    first = torch.autograd.grad(case()[0].square().sum(), case.tensors()[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=f"{operator}: double backward"):
        first.sum().backward()


@for_every_operator
def test_compiles_in_one_graph(operator):
    """Forward and backward under torch.compile(fullgraph=True) equal the eager ones."""
    case = example(operator).requires_grad()

    def step(*arguments):
        outputs = case.function(
            *(a * 1 if a.is_floating_point() else a for a in arguments), **case.options
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(output.square().mean() for output in outputs)

    compiled = torch.compile(step, fullgraph=True)
    expected = torch.autograd.grad(step(*case.arguments), case.tensors())
    found = torch.autograd.grad(compiled(*case.arguments), case.tensors())
    for one, two in zip(expected, found, strict=True):
        assert_close(two, one, torch.float32, gradient=True)


@for_every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(operator, dtype):
    """Mixed dtypes are accepted under autocast; the gradients come in the arguments' dtypes."""
    case = example(operator, dtype=torch.float32)
    case.arguments[1] = case.arguments[1].to(dtype)
    case.requires_grad()
    with torch.autocast("cpu", dtype=dtype):
        outputs = case()
        grads = gradients(outputs, case.tensors())
    assert outputs[0].dtype == (torch.float32 if operator == "residual_map" else dtype)
    for argument, grad in zip(case.tensors(), grads, strict=True):
        assert grad.dtype == argument.dtype
        assert torch.isfinite(grad).all()
    plain = example(operator, dtype=torch.float32)
    for one, two in zip(plain(), outputs, strict=True):
        assert (one - two).norm() / one.norm() < 3e-2


@for_every_operator
def test_autocast_leaves_float64_alone(operator):
    case = example(operator, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case()
    for one, two in zip(case(), found, strict=True):
        assert two.dtype == one.dtype and torch.equal(one, two)


@for_every_operator
def test_autocast_compiles_in_one_graph(operator):
    case = example(operator, dtype=torch.float32)

    def call(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = case.function(*arguments, **case.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    expected = call(*case.arguments)
    found = torch.compile(call, fullgraph=True)(*case.arguments)
    for one, two in zip(expected, found, strict=True):
        assert one.dtype == two.dtype
        assert (one.float() - two.float()).norm() / one.float().norm() < 1e-2


@for_every_operator
def test_fake_tensors_of_wrong_shape_are_refused_too(operator):
    """The checks hold while tracing, where no kernel runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        case = example(operator)
        case.arguments[1] = case.arguments[1][:, :1]
        with pytest.raises(ValueError, match=operator):
            case()


@for_every_operator
def test_torch_export_keeps_the_operator(operator):
    case = example(operator)

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return case.function(*arguments, **case.options)

    program = torch.export.export(Module(), tuple(case.arguments))
    assert any(f"grcsf.{operator}" in str(node.target) for node in program.graph.nodes)
    found = program.module()(*case.arguments)
    found = found if isinstance(found, tuple) else (found,)
    for one, two in zip(case(), found, strict=True):
        assert torch.equal(one, two)

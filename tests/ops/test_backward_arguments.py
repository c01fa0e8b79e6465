# SPDX-License-Identifier: Apache-2.0
"""A backward operator called by hand with anything wrong says what, before any kernel runs."""

from __future__ import annotations

import math

import pytest
import torch
from support import example, rcu

from grcsf_kernels.dispatch import OPERATORS

for_every_operator = pytest.mark.parametrize("operator", OPERATORS)


def backward_call(operator, device="cpu"):
    """The backward operator, its tensors by position, its options, and ``needs``."""
    case = example(operator)
    outputs = case()
    tensors = [torch.ones_like(output) for output in outputs]
    if operator == "rcu":
        tensors.append(outputs[1].detach())
        options = {"patch_size": case.options["patch_size"]}
    elif operator == "gcu":
        options = {"compensation": "dissimilarity", "eps": 1e-6}
    else:
        options = {
            "patch_size": case.options["patch_size"],
            "normalized_target": True,
            "average": "residuals",
            "eps": 1e-6,
        }
    tensors += case.arguments
    tensors = [tensor.to(device) for tensor in tensors]
    needs = [True] * sum(a.is_floating_point() for a in case.arguments)
    return getattr(torch.ops.grcsf, f"{operator}_backward"), tensors, options, needs


WRONG_TENSORS = {
    "one more axis": lambda t: t.new_zeros((*t.shape, 2)),
    "larger on the first axis": lambda t: t.new_zeros((t.shape[0] + 3, *t.shape[1:])),
    "larger on the last axis": lambda t: t.new_zeros((*t.shape[:-1], t.shape[-1] + 3)),
    "smaller on the last axis": lambda t: t[..., :0],
    "integers": lambda t: t.to(torch.int64),
    "complex": lambda t: t.to(torch.complex64),
    "of float64": lambda t: t.double(),
    "on another device": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
}


@for_every_operator
@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_every_wrong_tensor_is_refused_by_name(operator, kind):
    backward, tensors, options, needs = backward_call(operator)
    for position, tensor in enumerate(tensors):
        if tensor.ndim == 0 and "larger" in kind + kind.replace("smaller", "larger"):
            continue
        # Features of another size are right: they are interpolated.
        if (operator, position) == ("gcu", 3) and "last axis" in kind and "larger" in kind:
            continue
        wrong = list(tensors)
        wrong[position] = WRONG_TENSORS[kind](tensor)
        with pytest.raises((TypeError, ValueError), match=operator):
            backward(*wrong, *options.values(), needs)


@for_every_operator
def test_wrong_needs_are_refused(operator):
    backward, tensors, options, needs = backward_call(operator)
    for wrong in ([], needs[:-1], [*needs, True]):
        with pytest.raises(ValueError, match=f"{operator}_backward: needs has {len(wrong)} values"):
            backward(*tensors, *options.values(), wrong)


WRONG_OPTIONS = {
    "patch_size": ([0, 2, 2], [-1, 2, 2], [2, 2], [2] * 4, [-(2**62)] * 3),
    "eps": (0.0, -1.0, math.nan, math.inf, 1e-300, 1e300),
    "average": ("median",),
    "compensation": ("difference",),
}


@for_every_operator
def test_wrong_options_are_refused_forward_and_backward(operator):
    backward, tensors, options, needs = backward_call(operator)
    case = example(operator)
    for name in options:
        for wrong in WRONG_OPTIONS.get(name, ()):
            with pytest.raises(ValueError, match=name):
                backward(*tensors, *(options | {name: wrong}).values(), needs)
            with pytest.raises(ValueError, match=name):
                case.function(*case.arguments, **(case.options | {name: wrong}))


@for_every_operator
@pytest.mark.parametrize("name", ["patch_size", "eps", "average", "compensation"])
def test_options_of_another_type_are_refused(operator, name):
    case = example(operator)
    if name not in backward_call(operator)[2]:
        return
    for wrong in ([], "2", 2.5, True, None) if name == "patch_size" else ([], None, True, b""):
        if operator == "rcu" and wrong is None:
            continue  # the whole volume
        with pytest.raises((TypeError, ValueError), match=name):
            case.function(*case.arguments, **(case.options | {name: wrong}))


@pytest.mark.parametrize("patch_size", [2**63, 2**200, -(2**63)])
@pytest.mark.parametrize("operator", ["rcu", "residual_map"])
def test_huge_patch_sizes_are_refused(operator, patch_size):
    case = example(operator)
    with pytest.raises(ValueError, match=f"{operator}: patch_size"):
        case.function(*case.arguments, **(case.options | {"patch_size": patch_size}))


def test_a_patch_larger_than_the_volume_is_the_whole_volume():
    case = example("rcu")
    whole = rcu(*case.arguments, patch_size=None)
    found = rcu(*case.arguments, patch_size=2**63 - 1)
    for one, two in zip(whole, found, strict=True):
        assert torch.equal(one, two)


@for_every_operator
def test_meta_tensors_give_shapes_and_gradients(operator):
    """No kernel runs; shapes, dtypes and strides are those of real tensors."""
    real, meta = example(operator).requires_grad(), example(operator)
    meta.arguments = [a.to("meta") for a in meta.arguments]
    meta.requires_grad()
    ones, twos = real(), meta()
    ones = [*ones, *torch.autograd.grad(ones, real.tensors(), [torch.ones_like(o) for o in ones])]
    twos = [*twos, *torch.autograd.grad(twos, meta.tensors(), [torch.ones_like(o) for o in twos])]
    for one, two in zip(ones, twos, strict=True):
        assert two.device.type == "meta"
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


@for_every_operator
def test_wrong_meta_tensors_are_refused(operator):
    case = example(operator)
    case.arguments = [a.to("meta") for a in case.arguments]
    case.arguments[1] = case.arguments[1][:, :1]
    with pytest.raises(ValueError, match=operator):
        case()


@for_every_operator
def test_a_mix_of_meta_and_real_tensors_is_refused(operator):
    for position in range(len(example(operator).arguments)):
        case = example(operator)
        case.arguments[position] = case.arguments[position].to("meta")
        with pytest.raises(ValueError, match="meta"):
            case()

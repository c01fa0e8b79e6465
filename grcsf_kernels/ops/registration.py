# SPDX-License-Identifier: Apache-2.0
"""How an operator becomes ``torch.ops.grcsf.<name>``: one mechanism for all of them.

Every operator has a forward and a backward that are both ``torch.library`` operators with fake
kernels. The kernel that is registered checks its arguments, makes them dense, asks
:mod:`grcsf_kernels.dispatch` which backend runs it, and calls that backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.utils import fill_defaults
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from grcsf_kernels import dispatch
from grcsf_kernels.ops import checks

LIBRARY = torch.library.Library("grcsf", "DEF")

# Custom operators get their inputs in the strides that were traced: the layout of an output follows
# the layout of an input, so a compiler must not choose another one.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``grcsf::name`` with one kernel for all devices and one fake kernel."""
    LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    LIBRARY.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"grcsf::{name}", fake, lib=LIBRARY)


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast out of a kernel: its dtypes are decided, and a backend must not change them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        with without_autocast(device_type):
            return kernel(*args, **kwargs)

    return run


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off; nothing on devices that have none, such as meta."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Give ``grcsf::name`` its backward, and ``grcsf::name_backward`` a clear refusal.

    ``torch.func`` sees both as it sees an ``autograd.Function``: ``grad``, ``vjp`` and ``jacrev``
    call the same backward, ``vmap`` runs sample after sample. Forward-mode derivatives and second
    derivatives are refused by the operator's name.
    """

    def refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            f"{name}: double backward is not implemented; differentiate {name} once, or use "
            "plain PyTorch operations where second derivatives are needed"
        )

    _differentiate(name, name, backward, setup_context)
    _differentiate(name, f"{name}_backward", refuse, None)


def _differentiate(
    operator: str,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:
    """Register what autograd, forward-mode differentiation and ``vmap`` do with ``grcsf::name``.

    ``torch.library.register_autograd`` would drop tangents without a word, and fail inside
    ``torch.func`` without naming the operator.
    """
    op = getattr(torch.ops.grcsf, name).default

    def below(keyset: Any, keyword_only: dict[str, Any], *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            keys = keyset & torch._C._after_autograd_keyset
            return op.redispatch(keys, *args, **keyword_only)

    def forward(ctx: Any, *args_and_rest: Any) -> Any:
        *args, keyset, keyword_only, modes = args_and_rest
        if modes is None:
            output = below(keyset, keyword_only, *args)
        else:
            # Python's autograd.Function has switched both off. The next level of torch.func, which
            # is inside, needs them as they were.
            with torch.set_grad_enabled(modes[0]), forward_ad._set_fwd_grad_enabled(modes[1]):
                output = below(keyset, keyword_only, *args)
        if setup_context is not None:
            setup_context(ctx, args, keyword_only, output)
        ctx.backend = dispatch.asked()
        return output

    def reverse(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = needs[:-3]
            with dispatch.chosen(ctx.backend):
                return *backward(ctx, *grads), None, None, None
        finally:
            ctx.needs_input_grad = needs

    def tangent(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f"{operator}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad) are not implemented; use reverse mode (backward(), "
            "torch.func.grad, vjp, jacrev)"
        )

    # The dispatcher takes the levels of torch.func one by one and calls the kernel at each, as it
    # does for torch's own operators: autograd.Function itself would look at all levels at once.
    function: Any = type(
        name,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(reverse),
            "jvp": staticmethod(tangent),
        },
    )

    def kernel(keyset: Any, *args: Any, **keyword_only: Any) -> Any:
        args, keyword_only = fill_defaults(op._schema, args, keyword_only)
        forward_mode = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        # torch._C._any_requires_grad does this too, in versions after 2.6.
        reverse_mode = torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        )
        if not (forward_mode or reverse_mode):
            return below(keyset, keyword_only, *args)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*args, keyset, keyword_only, None)
        modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return function.apply(*args, keyset, keyword_only, modes)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(
        f"grcsf::{name}",
        lambda info, in_dims, *args, **options: _one_by_one(
            name, lambda *one: op(*one, **options), info.batch_size, in_dims, args
        ),
        lib=LIBRARY,
    )


def _one_by_one(
    name: str,
    call: Callable[..., Any],
    size: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
) -> tuple[Any, Any]:
    """The ``vmap`` of ``call``: once for each sample, the results stacked."""
    if size == 0:
        raise ValueError(f"{name}: vmap over an axis of size 0, expected at least 1")
    found = [
        call(
            *(
                arg.select(axis, index) if isinstance(axis, int) else arg
                for arg, axis in zip(args, in_dims, strict=True)
            )
        )
        for index in range(size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def register_autocast(name: str, cast: Callable[..., Sequence[Any]]) -> None:
    """Give ``grcsf::name`` its autocast rule.

    Args:
        name: the operator.
        cast: called with the dtype of the autocast region and the positional arguments; returns
            the positional arguments, cast.
    """
    op = getattr(torch.ops.grcsf, name).default

    def rule(device_type: str, key: str) -> Callable[..., Any]:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast(dtype, *args), **kwargs)

        return run

    LIBRARY.impl(name, rule("cpu", "AutocastCPU"), "AutocastCPU")
    LIBRARY.impl(name, rule("cuda", "AutocastCUDA"), "AutocastCUDA")


def cast_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A data tensor under autocast: in the region's dtype, except float64, which stays."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def cast_weight(tensor: Tensor) -> Tensor:
    """A gate or weight under autocast: float32, except float64, which stays."""
    return cast_data(tensor, torch.float32)


def none_to_empty(
    gradient: Tensor | None, like: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """A gradient as a backward operator returns it: dense, or empty where it was not asked for."""
    # The size as a tuple: subclasses of tensors, as MONAI's, take nothing else.
    return like.new_empty((0,)) if gradient is None else checks.dense(gradient, layout)


def empty_to_none(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of a backward operator as autograd wants them: None where not asked for."""
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))

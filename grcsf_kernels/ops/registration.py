# SPDX-License-Identifier: Apache-2.0
"""How an operator becomes ``torch.ops.grcsf.<name>``: one mechanism for all of them.

Every operator has a forward and a backward that are both ``torch.library`` operators with fake
kernels. The kernel that is registered checks its arguments, makes them dense, asks
:mod:`grcsf_kernels.dispatch` which backend runs it, and calls that backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
        if not torch.amp.is_autocast_available(device_type):
            return kernel(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args, **kwargs)

    return run


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Give ``grcsf::name`` its backward, and ``grcsf::name_backward`` a clear refusal."""
    torch.library.register_autograd(
        f"grcsf::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name}: double backward is not implemented; differentiate {name} once, or use "
            "plain PyTorch operations where second derivatives are needed"
        )

    torch.library.register_autograd(f"grcsf::{name}_backward", refuse, lib=LIBRARY)


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


def given(
    gradient: Tensor | None, like: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """A gradient as a backward operator returns it: dense, or empty where it was not asked for."""
    # The size as a tuple: subclasses of tensors, as MONAI's, take nothing else.
    return like.new_empty((0,)) if gradient is None else checks.dense(gradient, layout)


def asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of a backward operator as autograd wants them: None where not asked for."""
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))

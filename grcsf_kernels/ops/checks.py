# SPDX-License-Identifier: Apache-2.0
"""Argument checks and layouts, shared by the operators.

Each error names the operator and the argument, says what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from grcsf_kernels.common.dtypes import compute_dtype

DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require_tensors(operator: str, **arguments: object) -> None:
    """TypeError unless every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(value).__name__}, expected a Tensor")


def require_options(operator: str, kind: type, **options: object) -> None:
    """TypeError unless every option is of a type: torch's own error is no TypeError."""
    for name, value in options.items():
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise TypeError(
                f"{operator}: {name} is a {type(value).__name__}, expected a {kind.__name__}"
            )


def check_strided(operator: str, **tensors: Tensor) -> None:
    """TypeError unless the tensors are ordinary ones: not sparse, nested or of a library's own."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
            raise TypeError(
                f"{operator}: {name} is {kind}, expected a dense tensor (of layout torch.strided)"
            )


def check_data(operator: str, name: str, tensor: Tensor) -> None:
    """A volume [B, C, D, H, W] or image [B, C, H, W] of a floating dtype, no axis empty but B."""
    check_strided(operator, **{name: tensor})
    if tensor.dtype not in DATA_DTYPES:
        raise TypeError(
            f"{operator}: {name} is {tensor.dtype}, expected one of "
            f"{', '.join(str(d) for d in DATA_DTYPES)}"
        )
    if tensor.ndim not in (4, 5):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, "
            "expected [B, C, H, W] or [B, C, D, H, W]"
        )
    if any(size < 1 for size in tensor.shape[1:]):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, "
            "expected at least one channel and one voxel on every axis (only B may be 0)"
        )


def check_shape(
    operator: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str
) -> None:
    """ValueError unless ``tensor`` has the expected shape; ``meaning`` says it in symbols."""
    check_strided(operator, **{name: tensor})
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, "
            f"expected {tuple(expected)} ({meaning})"
        )


def check_like(operator: str, like: str, reference: Tensor, **tensors: Tensor) -> None:
    """TypeError / ValueError unless the tensors have the dtype and the device of ``reference``."""
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype}, "
                f"expected {reference.dtype}, the dtype of {like}"
            )
    check_device(operator, like, reference, **tensors)


def check_device(operator: str, like: str, reference: Tensor, **tensors: Tensor) -> None:
    """ValueError unless the tensors are on the device of ``reference``."""
    for name, tensor in tensors.items():
        if tensor.device != reference.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device}, "
                f"expected {reference.device}, the device of {like}"
            )


def check_weights(operator: str, like: str, data: Tensor, **tensors: Tensor) -> None:
    """Gates and weights are float32, or float64 with float64 data, on the data's device."""
    expected = compute_dtype(data.dtype)
    for name, tensor in tensors.items():
        if tensor.dtype != expected:
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype}, expected {expected} "
                f"(gates and weights of {data.dtype} data are {expected})"
            )
    check_device(operator, like, data, **tensors)


def check_option(operator: str, name: str, value: str, options: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(
            f"{operator}: {name} is {value!r}, expected one of {', '.join(map(repr, options))}"
        )


def check_eps(operator: str, eps: float, dtype: torch.dtype, power: int = 1) -> None:
    """ValueError unless ``eps`` to this power is a normal number where sums of ``dtype`` are taken.

    Zero vectors and constant patches would give NaN with 0, and with what becomes 0 in float32.
    """
    limits = torch.finfo(compute_dtype(dtype))
    least, most = limits.tiny ** (1 / power), limits.max ** (1 / power)
    if not least <= eps <= most:
        raise ValueError(
            f"{operator}: eps is {eps}, expected a number greater than 0, "
            f"for {dtype} data from {least:.2g} to {most:.2g}"
        )


def check_needs(operator: str, needs: Sequence[bool], count: int) -> None:
    """ValueError unless a backward is told of each of ``count`` gradients whether it is needed."""
    if len(needs) != count:
        raise ValueError(
            f"{operator}: needs has {len(needs)} values, expected {count}, one for each gradient"
        )


def patch_tuple(
    operator: str, patch_size: int | Sequence[int] | None, axes: int
) -> list[int] | None:
    """``patch_size`` as one integer per spatial axis; None stays None.

    Raises:
        TypeError: a size is not an integer.
        ValueError: not one size per axis, or a size below 1.
    """
    if patch_size is None:
        return None
    sizes = [patch_size] if isinstance(patch_size, int) else patch_size
    if not isinstance(sizes, Sequence) or any(
        not isinstance(size, int) or isinstance(size, bool) for size in sizes
    ):
        raise TypeError(
            f"{operator}: patch_size is {patch_size!r}, expected an integer or a sequence of them"
        )
    sizes = list(sizes) * (axes if len(sizes) == 1 else 1)
    if len(sizes) != axes or any(not 1 <= size < 2**63 for size in sizes):
        raise ValueError(
            f"{operator}: patch_size is {patch_size!r}, "
            f"expected an integer from 1 to 2^63 - 1, or one for each of the {axes} spatial axes"
        )
    return sizes


def layout_of(tensor: Tensor) -> torch.memory_format:
    """The layout that an output takes from this input: channels-last where its strides say so.

    It is read off the order of the strides, so that a slice of a channels-last tensor counts as
    channels-last. Where both layouts are the same bytes, it is the contiguous one.
    """
    if tensor.is_contiguous() or tensor.shape[1] == 1:
        return torch.contiguous_format
    smallest = 1
    for axis in (1, *range(tensor.ndim - 1, 1, -1), 0):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if size <= 1:
            continue
        if stride < smallest or (axis == 1 and stride != 1):
            return torch.contiguous_format
        smallest = stride * size
    return torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d


def strides_of(shape: Sequence[int], layout: torch.memory_format) -> tuple[int, ...]:
    """The strides of a dense tensor in a layout, also of axes of size 1: those of torch.empty."""
    order = [*range(len(shape) - 1, -1, -1)]
    if layout != torch.contiguous_format:
        order = [1, *range(len(shape) - 1, 1, -1), 0]
    strides, stride = [0] * len(shape), 1
    for axis in order:
        strides[axis] = stride
        stride *= max(shape[axis], 1)
    return tuple(strides)


def dense(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``tensor`` in ``layout``, with that layout's own strides even on axes of size 1.

    Everything that a kernel reads, and everything that an operator returns, goes through here. The
    stride of an axis of size 1 means nothing: NumPy, ``unsqueeze`` and torch.compile leave any
    number there, and torch calls the tensor contiguous all the same.
    """
    tensor = tensor.contiguous(memory_format=layout)
    strides = strides_of(tensor.shape, layout)
    # The same bytes: only strides of axes of size 1 differ, or those of a tensor without values.
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def empty(shape: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    """An uninitialized tensor of this shape and layout, with device and dtype of ``like``."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)


def check_counts(unit: str, **counts: object) -> None:
    """Hyper-parameters that count something are integers of at least 1.

    Raises:
        TypeError: a value is no integer.
        ValueError: a value is below 1.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"{unit}: {name} is {value!r}, a {type(value).__name__}, expected an integer >= 1"
            )
        if value < 1:
            raise ValueError(f"{unit}: {name} is {value}, expected at least 1")


def check_levels(unit: str, levels: object) -> None:
    """TypeError unless ``rcu_levels`` is a sequence of integers."""
    if isinstance(levels, Integral) and not isinstance(levels, bool):
        remedy = f": ({levels},) for level {levels}, () for none"
    elif isinstance(levels, Sequence) and all(
        isinstance(level, Integral) and not isinstance(level, bool) for level in levels
    ):
        return
    else:
        remedy = ", such as (0, 1)"
    raise TypeError(f"{unit}: rcu_levels is {levels!r}, expected a sequence of levels{remedy}")


def check_maps(unit: str, name: str, maps: object) -> None:
    """TypeError unless residual maps are one tensor."""
    if isinstance(maps, Tensor):
        return
    remedy = ": torch.cat(maps, dim=1) of maps [B, 1, *S]" if isinstance(maps, list | tuple) else ""
    raise TypeError(
        f"{unit}: {name} is a {type(maps).__name__}, expected one tensor [B, num_maps, *S]{remedy}"
    )

# SPDX-License-Identifier: Apache-2.0
"""The one place where probabilities, gradients and weights are required to be finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grcsf_kernels.common.errors import InputError


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; no memory is needed. Of sharded values, the own part.

    Args:
        values: any shape and dtype. Whole numbers and bool always are.
    """
    values = values.detach()
    values = values.to_local() if isinstance(values, DTensor) else values
    if values.numel() == 0 or not (values.is_floating_point() or values.is_complex()):
        return True
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    # NaN is the least and the largest value of a tensor that has one.
    low, high = values.aminmax()
    return bool(low.isfinite() & high.isfinite())


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that has NaN or infinite values; None: all are finite."""
    return next((name for name, values in named if not is_finite(values)), None)


def require_finite(
    where: Path | str, named: Iterable[tuple[str, Tensor]], what: str, remedy: str
) -> None:
    """Refuse tensors that have NaN or infinite values.

    Args:
        where: the file, case or step that they belong to.
        named: the tensors and their names.
        what: they are: ``"weights"``.
        remedy: what the user can do.

    Raises:
        InputError: names the first such tensor.
    """
    name = first_not_finite(named)
    if name is not None:
        raise InputError(where, f"has {what} that are NaN or infinite ({name})", remedy)


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, lists and tuples, with their names joined by dots."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from tensors_of(item, f"{name}.{key}" if name else str(key))

# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operator, and why another one does not.

Each backend is a subpackage (``reference``, ``native`` for ``cpu`` and ``cuda``, ``triton``) that
says what it can run. One predicate, :func:`why_not`, is read by the automatic choice, by the
error of an explicit choice and by :func:`backends`, so that the three can never disagree.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grcsf_kernels.common.backends import BACKENDS, EMULATED, OPERATORS

__all__ = [
    "BACKENDS",
    "EMULATED",
    "OPERATORS",
    "BackendStatus",
    "asked",
    "automatic",
    "backends",
    "chosen",
    "implementation",
    "measured_preferences",
    "select",
    "use_backend",
    "why_not",
]

_PACKAGES = {
    "reference": "reference",
    "cpu": "native",
    "triton": "triton",
    "cuda": "native",
    EMULATED: "native",
}
_PREFERENCES = Path(__file__).with_name("backend_preferences.json")
_PREFERENCE = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


@dataclass(eq=False)
class _Choice:
    """One entry of :func:`use_backend`, removed by identity: blocks may end in any order."""

    backend: str
    active: bool = True


# Choices in the order in which their blocks began: those of this context (a thread, a task), and
# those of the process. A tuple is replaced, never changed, so that readers need no lock.
_own: ContextVar[tuple[_Choice, ...]] = ContextVar("grcsf_kernels_backend", default=())
_all: tuple[_Choice, ...] = ()
_lock = threading.Lock()
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class BackendStatus:
    """What :func:`backends` says of one backend; true where it can run something.

    Attributes:
        available: whether at least one operator runs here on this backend.
        reason: why it is not available, or an empty string.
        operators: the operators that it has kernels for.
    """

    available: bool
    reason: str
    operators: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.available


def _package(backend: str) -> ModuleType:
    return importlib.import_module(f"grcsf_kernels.{_PACKAGES[backend]}")


def why_not(backend: str, operator: str | None = None, device_type: str | None = None) -> str:
    """The reason why ``backend`` can't run, or an empty string where it can.

    Args:
        backend: one of ``BACKENDS``.
        operator: one of ``OPERATORS``; without it, whether the backend can run anything.
        device_type: the type of the tensors' device, such as ``"cuda"``; without it, any.
    """
    package = _package(backend)
    reason = package.why_not(backend)
    if reason:
        return reason
    devices = package.device_types(backend)
    if device_type is not None and devices is not None and device_type not in devices:
        return f"it runs on {' and '.join(devices)} tensors, and these are on {device_type}"
    operators = package.operators(backend)
    if operator is None:
        return "" if operators else "this version of the library has no kernels for it yet"
    if operator not in operators:
        return f"it has no {operator} kernel yet (it has: {', '.join(operators) or 'none'})"
    return ""


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it can run here, for which operators, and if not, why.

    Example:
        >>> import grcsf_kernels
        >>> bool(grcsf_kernels.backends()["reference"])
        True
    """
    found = {}
    for backend in BACKENDS:
        reason = why_not(backend)
        operators = () if reason else tuple(_package(backend).operators(backend))
        found[backend] = BackendStatus(not reason, reason, operators)
    return found


def _check_name(name: str, where: str) -> None:
    if name not in _PACKAGES:
        raise ValueError(f"{where} names backend {name!r}, expected one of {', '.join(BACKENDS)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on backend ``name``.

    An explicit choice never falls back: an operator that the backend can't run raises. Of nested
    blocks the inner one holds. Blocks of several threads or tasks may overlap and end in any order:
    each holds for its own thread, and a thread without a block of its own takes the block of
    the process that began last. A backward runs on the backend that its forward was asked to run
    on, wherever it is called and on whatever thread autograd runs it; where the forward was
    compiled or was asked for none, the rules for a forward hold.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: the backend can't run here; the message says why. Also inside a function that
            ``torch.compile`` traces, where the choice would not hold: put the block around the
            call of the compiled function.

    Example:
        >>> import torch, grcsf_kernels
        >>> with grcsf_kernels.use_backend("reference"):
        ...     residual = grcsf_kernels.residual_map(
        ...         torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), patch_size=2)
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: inside a compiled function the choice would not hold; put the `with` "
            "block around the call of the compiled function"
        )
    _check_name(name, "use_backend")
    reason = why_not(name)
    if reason:
        raise RuntimeError(f"use_backend: backend {name!r} can't run here: {reason}")
    with chosen(name):
        yield


@contextmanager
def chosen(name: str | None) -> Iterator[None]:
    """:func:`use_backend` without its checks; None: nothing is chosen."""
    global _all
    if name is None:
        yield
        return
    choice = _Choice(name)
    _own.set((*_own.get(), choice))
    with _lock:
        _all = (*_all, choice)
    try:
        yield
    finally:
        # A generator may be closed in another context than it was begun in: there the choice is
        # found inactive.
        choice.active = False
        _own.set(tuple(other for other in _own.get() if other.active))
        with _lock:
            _all = tuple(other for other in _all if other is not choice)


def asked() -> str | None:
    """The backend that :func:`use_backend` asks for here; None: none."""
    every = _all
    if not every:
        return None
    own = [choice for choice in _own.get() if choice.active]
    return (own or every)[-1].backend


def select(operator: str, device_type: str, data: Tensor | None = None) -> str:
    """The backend that runs ``operator`` on tensors of ``device_type``.

    ``use_backend`` comes before ``GRCSF_BACKEND``, and that before the automatic choice, which
    falls back to ``reference`` and says so once for each operator and device type.

    Args:
        operator: one of ``OPERATORS``.
        device_type: such as ``"cuda"``.
        data: the operator's first argument, for what depends on dtype and size.

    Raises:
        ValueError: ``GRCSF_BACKEND`` names no backend.
        RuntimeError: the backend that was asked for can't run this.
    """
    forced = asked() or os.environ.get("GRCSF_BACKEND", "")
    if forced:
        _check_name(forced, "GRCSF_BACKEND")
        reason = why_not(forced, operator, device_type)
        if reason:
            raise RuntimeError(f"{operator}: backend {forced!r} was asked for, but {reason}")
        return forced
    backend, reasons = automatic(operator, device_type, data)
    if backend == "reference" and (operator, device_type) not in _warned:
        _warned.add((operator, device_type))
        why = "; ".join(reasons) or f"no backend has kernels for {device_type} tensors"
        warnings.warn(
            f"grcsf_kernels: {operator} on {device_type} tensors runs on the reference backend "
            f"({why}). Said once; see `grcsf doctor`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return backend


@cache
def measured_preferences() -> tuple[dict[str, Any], ...]:
    """What was measured to be faster on ``triton`` than on ``cuda``: rows of
    ``backend_preferences.json``.

    Each row names operator, dtype, a range of voxels of one sample, and the committed results that
    it comes from; ``benchmarks/gpu/preferences.py`` writes them.
    """
    return tuple(json.loads(_PREFERENCES.read_text())["rows"])


def _faster_on_triton(operator: str, data: Tensor) -> bool:
    return any(
        row["operator"] == operator
        and row["dtype"] == str(data.dtype).removeprefix("torch.")
        and row["voxels"][0] <= data.shape[2:].numel() < row["voxels"][1]
        for row in measured_preferences()
    )


def automatic(operator: str, device_type: str, data: Tensor | None = None) -> tuple[str, list[str]]:
    """The backend that is taken when none is asked for, and why each better one was not."""
    reasons: list[str] = []
    preference = _PREFERENCE.get(device_type, ())
    if "triton" in preference and data is not None and _faster_on_triton(operator, data):
        preference = ("triton", *(name for name in preference if name != "triton"))
    for backend in preference:
        reason = why_not(backend, operator, device_type)
        if not reason:
            return backend, reasons
        reasons.append(f"{backend}: {reason}")
    return "reference", reasons


def implementation(operator: str, data: Tensor) -> ModuleType:
    """The module with ``forward`` and ``backward`` of ``operator`` for its first argument."""
    backend = select(operator, data.device.type, data)
    return importlib.import_module(f"grcsf_kernels.{_PACKAGES[backend]}.{operator}")

# SPDX-License-Identifier: Apache-2.0
"""Random calls of the operators, forward and backward, against the reference in float64.

The bounds are those of the tests. Where a case is ill-conditioned they can't be met in its dtype;
then the kernel must be as good as plain PyTorch in that dtype, which is what the reference runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from fuzz.arguments import Call, Maker
from fuzz.refusals import check_refusal
from support import TOLERANCES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import grcsf_kernels
from grcsf_kernels import native
from grcsf_kernels.dispatch import EMULATED, why_not
from grcsf_kernels.ops import checks
from grcsf_kernels.triton import interpreting

ISAS = ("portable", "avx2", "avx512")

# How much worse than plain PyTorch a kernel may be where that is beyond the bounds.
AS_GOOD_AS = 4.0


def backends() -> list[str]:
    """The backends that run on CPU tensors here, the fast ones often."""
    found = ["reference"]
    for backend, often in (("cpu", 30), (EMULATED, 10), ("triton", 1 if interpreting() else 0)):
        if not why_not(backend, "gcu", "cpu"):
            found += [backend] * often
    return found


def isas() -> list[str]:
    """The instruction sets that this processor has."""
    return list(ISAS[: ISAS.index(native.library().widest_isa()) + 1])


@contextmanager
def running(backend: str, isa: str, threads: int) -> Iterator[None]:
    """Run on this backend, instruction set and number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if backend == "cpu":
            native.library().choose_isa(isa)
        with grcsf_kernels.use_backend(backend):
            yield
    finally:
        torch.set_num_threads(before)


def run(call: Call, incoming: Sequence[Tensor], *, exact: bool = False) -> list[Tensor | None]:
    """Outputs and gradients (None where not asked for); ``exact`` in float64."""
    arguments = [
        a if a is None or not a.is_floating_point() else (a.double() if exact else a.detach())
        for a in call.arguments
    ]
    for argument, need in zip(arguments, call.needs, strict=True):
        if argument is not None and argument.is_floating_point():
            argument.requires_grad_(need)
    outputs = getattr(grcsf_kernels, call.operator)(*arguments, **call.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [a for a, need in zip(arguments, call.needs, strict=True) if need]
    gradients = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
    grads = iter(torch.autograd.grad(outputs, wanted, gradients))
    return [*(o.detach() for o in outputs), *(next(grads) if n else None for n in call.needs)]


def smallest(dtype: torch.dtype) -> float:
    """What values of a dtype may always be off by: they, or what they are made of, are denormal."""
    own = torch.finfo(dtype)
    return max(1e3 * torch.finfo(checks.compute_dtype(dtype)).tiny, own.tiny * own.eps)


def error(found: Tensor, exact: Tensor, both: Tensor) -> tuple[float, float]:
    """The relative error of the norm and of the worst element, over elements that are finite."""
    floor = smallest(found.dtype)
    found, exact = found.double()[both], exact[both]
    if not exact.numel():
        return 0.0, 0.0
    difference, largest = (found - exact).abs(), exact.abs().amax().item()
    difference = (difference - floor).clamp(min=0)
    scale = exact.norm().item()
    if scale == 0:
        return difference.amax().item(), difference.amax().item()
    return difference.norm().item() / scale, difference.amax().item() / largest


def compare(
    what: str, found: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, gradient: bool
) -> None:
    """Raise unless values are in bounds, and NaN and Inf are where they belong."""
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} != {tuple(exact.shape)}"
    rounded = exact.to(found.dtype)
    finite = found.isfinite()
    wrong = (finite != rounded.isfinite()) & (finite != plain.isfinite())
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values, such as {place}: "
            f"{found[place]}, expected {exact[place]} (plain PyTorch: {plain[place]})"
        )
    both = finite & rounded.isfinite() & plain.isfinite()
    bound = TOLERANCES[dtype][1 if gradient else 0]
    errors, plain_errors = error(found, exact, both), error(plain, exact, both)
    for kind, own, other in zip(("norm", "worst element"), errors, plain_errors, strict=True):
        if own > max(bound, AS_GOOD_AS * other):
            raise AssertionError(
                f"{what}: {kind} off by {own:.2e}, bound {bound:.0e} (plain PyTorch: {other:.2e})"
            )


def same_bits(one: Sequence[Tensor | None], two: Sequence[Tensor | None], why: str) -> None:
    """Raise unless all values are equal; NaN equals NaN."""
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        if a is not None and b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            equal = torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            assert equal and torch.equal(a.isnan(), b.isnan()), f"result {index} depends on {why}"


def check_strides(call: Call, incoming: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
    """Raise unless results have the shapes, dtypes and strides that the fake kernels say."""
    with FakeTensorMode() as mode:
        faked = [None if a is None else mode.from_tensor(a) for a in call.arguments]
        fake_call = Call(call.operator, call.dtype, call.names, faked, call.options, call.needs)
        said = run(fake_call, [mode.from_tensor(g) for g in incoming])
    for index, (one, two) in enumerate(zip(said, found, strict=True)):
        if one is not None and two is not None:
            assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride()), (
                f"result {index}: the fake kernel says {one.shape}, {one.dtype}, {one.stride()}, "
                f"the kernel gives {two.shape}, {two.dtype}, {two.stride()}"
            )


def check(case: int) -> str:
    """Run one case.

    Args:
        case: its number.

    Returns:
        What kind of case it was.

    Raises:
        AssertionError: a result is wrong.
    """
    maker = Maker(case)
    if maker.random.random() < 0.15:
        return check_refusal(maker)
    call = maker.call()
    backend = maker.random.choice(backends())
    isa, threads = maker.random.choice(isas()), maker.random.choice((1, 2, 3))
    with FakeTensorMode() as mode:
        arguments = [None if a is None else mode.from_tensor(a) for a in call.arguments]
        shapes = getattr(grcsf_kernels, call.operator)(*arguments, **call.options)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    incoming = [maker.placed(maker.values(list(o.shape), o.dtype)) for o in shapes]
    sizes = [None if a is None else (tuple(a.shape), a.dtype, a.stride()) for a in call.arguments]
    about = f"{call.operator} on {backend} ({isa}, {threads} threads), {call.notes}, {call.options}"
    about += "".join(f"\n  {n}: {s}" for n, s in zip(call.names, sizes, strict=True))
    try:
        with running(backend, isa, threads):
            found = run(call, incoming)
        with running("reference", isa, 1):
            exact, plain = run(call, incoming, exact=True), run(call, incoming)
        outputs = len(shapes)
        names = [f"output {i}" for i in range(outputs)] + [f"gradient of {n}" for n in call.names]
        for index, name in enumerate(names):
            one, two, three = found[index], exact[index], plain[index]
            if one is None or two is None or three is None:
                assert one is None and two is None, f"{name}: given where it was not asked for"
                continue
            narrow = min((call.dtype, one.dtype), key=lambda d: -torch.finfo(d).eps)
            compare(name, one, two, three, narrow, index >= outputs)
        if maker.random.random() < 0.25:
            with running(backend, isa, threads % 3 + 1):
                same_bits(found, run(call, incoming), "the number of threads")
        if maker.random.random() < 0.15:
            check_strides(call, incoming, found)
    except Exception as failure:
        raise AssertionError(f"{failure}\n{about}") from failure
    return f"{call.operator} on {backend} {isa if backend == 'cpu' else ''}".strip()

# SPDX-License-Identifier: Apache-2.0
"""Random calls of the operators, forward and backward, against the reference in float64.

The bounds are those of the tests. Where a case is ill-conditioned no kernel can meet them; then a
result may be off by what a few roundings of the arguments change, and by a small multiple of the
error of plain PyTorch in the same dtype, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fuzz.arguments import Call, Maker
from fuzz.refusals import check_refusal
from support import TOLERANCES, function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import grcsf_kernels
from grcsf_kernels import native
from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.dispatch import EMULATED, why_not
from grcsf_kernels.triton import interpreting

ISAS = ("portable", "avx2", "avx512")

# Where a case is ill-conditioned: how many times the error of plain PyTorch is allowed, and how
# many times the effect of rounding the arguments.
AS_GOOD_AS = 4.0
AS_ROUND_AS = 16.0
# The error of rcu's tables in the terms that its results are summed of (docs/operators.md).
TABLES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 5e-5, torch.float16: 5e-5}


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
    before, own = torch.get_num_threads(), native.library().isa()
    torch.set_num_threads(threads)
    try:
        if backend == "cpu":
            native.library().choose_isa(isa)
        with grcsf_kernels.use_backend(backend):
            yield
    finally:
        torch.set_num_threads(before)
        native.library().choose_isa(own)


def run(call: Call, incoming: Sequence[Tensor], exact: bool = False) -> list[Tensor | None]:
    """Outputs and gradients (None where not asked for); ``exact`` in float64."""
    arguments = [
        a if a is None or not a.is_floating_point() else (a.double() if exact else a.detach())
        for a in call.arguments
    ]
    for argument, need in zip(arguments, call.needs, strict=True):
        if argument is not None and argument.is_floating_point():
            argument.requires_grad_(need)
    outputs = function(call.operator)(*arguments, **call.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [a for a, need in zip(arguments, call.needs, strict=True) if need]
    gradients = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
    grads = iter(torch.autograd.grad(outputs, wanted, gradients))
    return [*(o.detach() for o in outputs), *(next(grads) if n else None for n in call.needs)]


def perturbed(call: Call, incoming: Sequence[Tensor], seed: int) -> list[Tensor | None]:
    """Results in float64 where arguments and gradients are off by a few roundings."""
    generator = torch.Generator().manual_seed(seed)
    step = 8 * torch.finfo(compute_dtype(call.dtype)).eps

    def moved(tensor: Tensor | None) -> Any:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.detach().double() * (1 + step * noise)

    arguments = [moved(a) for a in call.arguments]
    other = Call(call.operator, call.dtype, call.names, arguments, call.options, call.needs)
    return run(other, [moved(g) for g in incoming], exact=True)


def smallest(dtype: torch.dtype) -> float:
    """What values of a dtype may always be off by: they, or what they are made of, are denormal."""
    own = torch.finfo(dtype)
    return max(1e3 * torch.finfo(compute_dtype(dtype)).tiny, own.tiny * own.eps)


def check_finite(what: str, found: Tensor, exact: Tensor, plain: Tensor, spreads: bool) -> None:
    """Raise unless NaN and Inf are where they belong.

    Where sums overflow in the dtype of the sums alone, plain PyTorch in that dtype says it. Where
    they may spread, none may be missing.
    """
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} != {tuple(exact.shape)}"
    finite = found.isfinite()
    wrong = (finite != exact.to(found.dtype).isfinite()) & (finite != plain.isfinite())
    if spreads:
        wrong &= finite
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values, such as {place}: "
            f"{found[place]}, expected {exact[place]} (plain PyTorch: {plain[place]})"
        )


def magnitudes(call: Call, incoming: Sequence[Tensor]) -> list[Tensor | None] | None:
    """How large the sums are that rcu's results are made of, in float64; None: another operator.

    Nothing cancels and nothing saturates: all values positive, residual voxels of random signs, and
    all of a patch weighed alike. A softmax that chooses one voxel, or voxels that are
    all alike, have gradients of 0 up to the rounding of these sums. What the gradients of the score
    are summed of keeps the score as it is.
    """
    if call.operator != "rcu":
        return None
    even: list[Tensor | None] = []
    scored: list[Tensor | None] = []
    for name, argument in zip(call.names, call.arguments, strict=True):
        assert argument is not None
        found = argument.nan_to_num(1.0, 1.0, 1.0)
        scored.append(found.abs() if name.startswith("value_") else found)
        if name == "residual":
            signs = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)) - 0.5
            even.append(found.abs() * signs.sign())
        elif name.startswith(("query_", "score_")):
            even.append(torch.zeros_like(found))
        else:
            even.append(found.abs())
    grads = [g.nan_to_num(1.0, 1.0, 1.0).abs() for g in incoming]
    one, two = (
        run(Call(call.operator, call.dtype, call.names, a, call.options, call.needs), grads, True)
        for a in (even, scored)
    )
    first = len(incoming) + [name.startswith("score_") for name in call.names].index(True)
    return [*one[:first], *two[first:]]


def beyond(
    found: Tensor,
    exact: Tensor,
    bound: float,
    others: Sequence[tuple[float, Tensor]] = (),
) -> str:
    """By how much the relative error of the norm or of the worst element is beyond the bound.

    Args:
        found: the result.
        exact: the same in float64.
        bound: of the relative error.
        others: factors and tensors of which the norm and the largest value are allowed besides.
    """
    both = found.isfinite() & exact.isfinite()
    if not both.any():
        return ""
    error = ((found.double() - exact).abs() - smallest(found.dtype))[both].clamp(min=0)
    scale, largest = exact[both].norm(), exact[both].abs().amax()
    finite = [(factor, t.double()[both].nan_to_num(0.0, 0.0, 0.0)) for factor, t in others]
    if error.norm() > bound * scale + sum(factor * t.norm() for factor, t in finite):
        return f"norm off by {error.norm() / scale:.2e}, bound {bound:.0e}"
    if error.amax() > bound * largest + sum(factor * t.abs().amax() for factor, t in finite):
        return f"worst element off by {error.amax() / largest:.2e}, bound {bound:.0e}"
    return ""


def check_values(
    call: Call,
    incoming: Sequence[Tensor],
    found: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    plain: Sequence[Tensor | None],
) -> None:
    """Raise unless all outputs and gradients are in bounds."""
    outputs = len(incoming)
    names = [f"output {i}" for i in range(outputs)] + [f"gradient of {n}" for n in call.names]
    moved: list[list[Tensor | None]] = []
    large: list[Tensor | None] | None = None
    # The sums over all voxels that are the gradients of rcu's weights (docs/operators.md).
    sums = range(outputs + 2, len(names)) if call.operator == "rcu" else range(0)
    damaged = not all(a is None or a.isfinite().all() for a in (*call.arguments, *incoming))
    for index, name in enumerate(names):
        one, two, three = found[index], exact[index], plain[index]
        if one is None or two is None or three is None:
            assert one is None and two is None, f"{name}: given where it was not asked for"
            continue
        check_finite(name, one, two, three, damaged and index in sums)
        if index >= outputs and call.operator == "gcu" and two.ndim > 1 and two.shape[1] == 1:
            continue  # the cosine of one channel is a sign: its gradient is 0, and rounding
        dtype = max((call.dtype, one.dtype), key=lambda d: torch.finfo(d).eps)
        bound = TOLERANCES[dtype][1 if index >= outputs else 0]
        if beyond(one, two, bound):
            # Is it the kernel, or can't any be better? How far results move where arguments do.
            if not moved:
                with running("reference", "portable", 1):
                    moved = [perturbed(call, incoming, i) for i in range(5)]
                    large = magnitudes(call, incoming)
            sensitivity = torch.stack(
                [(other[index] - two).abs() for other in moved]  # type: ignore[operator]
            ).amax(dim=0)
            others = [(AS_GOOD_AS, three.double() - two), (AS_ROUND_AS, sensitivity)]
            if large is not None:
                others.append((TABLES[call.dtype], large[index]))  # type: ignore[arg-type]
                if name.startswith("gradient of score_"):
                    # The slope of the sigmoid is taken from scores, which are near 1.
                    eps = torch.finfo(compute_dtype(call.dtype)).eps
                    least = float((1 - exact[1]).nan_to_num(1.0).amin())  # type: ignore[operator]
                    others.append((2 * eps / max(least, eps), two))
            if call.operator == "gcu" and index < outputs:
                # Both are of 1 + cos or 1 - cos, which may be 0.
                skip = call.arguments[0]
                assert skip is not None
                others.append((bound, skip.double() if index == 0 else torch.ones_like(two)))
            why = beyond(one, two, bound, others)
            assert not why, f"{name}: {why}, also where rounding is allowed for"


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
        shapes = function(call.operator)(*arguments, **call.options)
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
        check_values(call, incoming, found, exact, plain)
        if maker.random.random() < 0.25 and backend != "reference":
            with running(backend, isa, threads % 3 + 1):
                same_bits(found, run(call, incoming), "the number of threads")
        if maker.random.random() < 0.15:
            check_strides(call, incoming, found)
    except Exception as failure:
        raise AssertionError(f"{failure}\n{about}") from failure
    return f"{call.operator} on {backend} {isa if backend == 'cpu' else ''}".strip()

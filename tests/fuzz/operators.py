# SPDX-License-Identifier: Apache-2.0
"""Random calls of the operators, forward and backward, against the reference in float64.

The bounds are those of the tests. Where a case is ill-conditioned no kernel can meet them; then a
result may be off by what a few roundings of the arguments change, and by a small multiple of the
error of plain PyTorch in the same dtype, and no more.
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

# Where a case is ill-conditioned: how many times the effect of rounding its arguments, and how many
# times the error of plain PyTorch, are allowed.
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


def perturbed(call: Call, seed: int) -> Call:
    """The call in float64 with its arguments off by a few roundings of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    step = 8 * torch.finfo(checks.compute_dtype(call.dtype)).eps

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.detach().double() * (1 + step * noise)

    arguments = [moved(a) for a in call.arguments]
    return Call(call.operator, call.dtype, call.names, arguments, call.options, call.needs)


def smallest(dtype: torch.dtype) -> float:
    """What values of a dtype may always be off by: they, or what they are made of, are denormal."""
    own = torch.finfo(dtype)
    return max(1e3 * torch.finfo(checks.compute_dtype(dtype)).tiny, own.tiny * own.eps)


def check_finite(what: str, found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Raise unless NaN and Inf are where they belong.

    Where sums overflow in the dtype of the sums alone, plain PyTorch in that dtype says it.
    """
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} != {tuple(exact.shape)}"
    finite = found.isfinite()
    wrong = (finite != exact.to(found.dtype).isfinite()) & (finite != plain.isfinite())
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values, such as {place}: "
            f"{found[place]}, expected {exact[place]} (plain PyTorch: {plain[place]})"
        )


def unsaturated(call: Call, incoming: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Results in float64 with all voxels of a patch weighed alike; None: nothing can saturate.

    A softmax that chooses one voxel has gradients of almost 0. A table of it is as good as its
    values are before that.
    """
    if call.operator != "rcu":
        return None
    queries = [name.startswith("query_") for name in call.names]
    arguments = [
        torch.zeros_like(a) if query and a is not None else a
        for query, a in zip(queries, call.arguments, strict=True)
    ]
    even = Call(call.operator, call.dtype, call.names, arguments, call.options, call.needs)
    return run(even, incoming, exact=True)


def beyond(
    found: Tensor,
    exact: Tensor,
    bound: float,
    allowed: Tensor | float = 0.0,
    others: Sequence[tuple[float, Tensor]] = (),
) -> str:
    """By how much the relative error of the norm or of the worst element is beyond the bound.

    Args:
        found: the result.
        exact: the same in float64.
        bound: of the relative error.
        allowed: what every element may be off by besides.
        others: factors and tensors of which the norm and the largest value are allowed besides.
    """
    both = found.isfinite() & exact.isfinite()
    if not both.any():
        return ""
    error = ((found.double() - exact).abs() - smallest(found.dtype) - allowed)[both].clamp(min=0)
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
    even: list[Tensor | None] | None = None
    for index, name in enumerate(names):
        one, two, three = found[index], exact[index], plain[index]
        if one is None or two is None or three is None:
            assert one is None and two is None, f"{name}: given where it was not asked for"
            continue
        check_finite(name, one, two, three)
        if index >= outputs and call.operator == "gcu" and two.ndim > 1 and two.shape[1] == 1:
            continue  # the cosine of one channel is a sign: its gradient is 0, and rounding
        dtype = max((call.dtype, one.dtype), key=lambda d: torch.finfo(d).eps)
        bound = TOLERANCES[dtype][1 if index >= outputs else 0]
        if beyond(one, two, bound):
            # Is it the kernel, or can't any be better? How far results move where arguments do.
            if not moved:
                with running("reference", "portable", 1):
                    moved = [run(perturbed(call, i), incoming, exact=True) for i in range(5)]
                    even = unsaturated(call, incoming)
            sensitivity = torch.stack(
                [(other[index] - two).abs() for other in moved]  # type: ignore[operator]
            ).amax(dim=0)
            others = [(AS_GOOD_AS, three.double() - two)]
            if even is not None:
                table = TOLERANCES[checks.compute_dtype(call.dtype)][0]
                others.append((table, even[index]))  # type: ignore[arg-type]
            why = beyond(one, two, bound, AS_GOOD_AS * sensitivity.nan_to_num(0.0), others)
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
        check_values(call, incoming, found, exact, plain)
        if maker.random.random() < 0.25:
            with running(backend, isa, threads % 3 + 1):
                same_bits(found, run(call, incoming), "the number of threads")
        if maker.random.random() < 0.15:
            check_strides(call, incoming, found)
    except Exception as failure:
        raise AssertionError(f"{failure}\n{about}") from failure
    return f"{call.operator} on {backend} {isa if backend == 'cpu' else ''}".strip()

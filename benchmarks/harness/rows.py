# SPDX-License-Identifier: Apache-2.0
"""One row: check the result, then measure time, memory and launches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure, memory, sampled, work
from benchmarks.harness.cases import Case, make_inputs
from benchmarks.peers import Peer, Repeatable, Runner, backend_peer

# A wrong result is not timed: relative error of the norm. Looser than the tests, because textbook
# peers round queries and keys to the dtype of the data.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}

_MOST_ROUNDS = 50


class Absent(Exception):
    """A row that is not measured; the text says why."""


@dataclass(frozen=True)
class Row:
    """What identifies a row.

    Attributes:
        subject: the operator, module or task.
        case: what it is done on, as one reads it.
        family: cases that belong together.
        peer: who does it.
        backward: forward + backward, not forward alone.
        voxels: size of the volume.
    """

    subject: str
    case: str
    family: str
    peer: str
    backward: bool
    voxels: int

    @classmethod
    def of(cls, case: Case, backward: bool, peer: str) -> Row:
        """The row of a case, a direction and a peer."""
        return cls(case.subject, case.title, case.family, peer, backward, case.voxels)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "subject": self.subject,
            "case": self.case,
            "family": self.family,
            "peer": self.peer,
            "direction": "forward+backward" if self.backward else "forward",
            "voxels": self.voxels,
        }


@dataclass
class Session:
    """What the rows of one run share.

    Attributes:
        device: ``cpu`` or ``cuda``.
        seconds: how long one row is measured.
        longest_call: in seconds; a call that is expected to take longer is not begun.
        memory: bytes that one call may take beyond its inputs.
        absent: rows that were not measured, and why.
    """

    device: str
    seconds: float
    longest_call: float
    memory: int
    absent: list[dict[str, Any]] = field(default_factory=list)
    _roofs: dict[str, float] = field(default_factory=dict)
    # The largest case so far of a row's family: voxels, seconds and bytes of a call.
    _seen: dict[tuple[Any, ...], tuple[int, float, int]] = field(default_factory=dict)
    _expected: tuple[Any, dict[str, Tensor]] | None = None

    def roofs(self) -> dict[str, float]:
        """Copy bandwidth and arithmetic rate, measured once in this process."""
        if not self._roofs:
            self._roofs = {
                "copy_bandwidth": measure.copy_bandwidth(self.device),
                "arithmetic_rate": measure.arithmetic_rate(self.device),
            }
        return self._roofs

    def refuse(self, row: Row, growth: int) -> None:
        """Raise ``Absent`` where smaller cases foretell that a call would not end or not fit."""
        if self._key(row) not in self._seen:
            return
        voxels, seconds, taken = self._seen[self._key(row)]
        factor = (row.voxels / voxels) ** growth
        if taken * factor > self.memory:
            raise Absent(
                f"out of memory: a call would need about {taken * factor / 2**30:.0f} GiB of "
                f"{self.memory / 2**30:.0f} GiB"
            )
        # One point more of a line is not worth minutes.
        limit = self.longest_call / (3 if row.family == "scaling" else 1)
        if seconds * factor > limit:
            raise Absent(
                f"too slow: a call would take about {_readable(seconds * factor)}, "
                f"the limit is {_readable(limit)}"
            )

    def saw(self, row: Row, seconds: float, taken: int) -> None:
        """Remember what a call took, for larger ones."""
        self._seen[self._key(row)] = (row.voxels, seconds, taken)

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return row.subject, row.family, row.backward, row.peer

    def expected(self, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the reference gives, computed once for all peers of a case; the last one is kept."""
        if self._expected is None or self._expected[0] != key:
            self._expected = None  # frees the memory first
            self._expected = (key, compute())
        return self._expected[1]


def _readable(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def run_row(
    session: Session,
    benchmark: Any,
    row: Row,
    make: Callable[[int], Repeatable],
    *,
    floor: work.Work | None = None,
    check: Callable[[dict[str, Tensor]], float] | None = None,
    growth: int = 1,
    input_bytes: int = 0,
    warm_up: bool = True,
) -> None:
    """Measure a row through the fixture of pytest-benchmark.

    Args:
        session: what the rows share.
        benchmark: the fixture.
        row: its identity.
        make: makes the runner of the i-th set of inputs.
        floor: the least that the call costs.
        check: relative error of outputs and gradients; raises where it is too large.
        growth: the power of the volume with which the cost grows.
        input_bytes: of one set of inputs: so many sets take turns that the cache holds none.
        warm_up: call once before measuring; without, the call whose memory is measured comes first
            (for calls of minutes, in which nothing is compiled).

    Raises:
        Absent: the row can't be measured, and why.
    """
    device, roofs = session.device, session.roofs()
    session.refuse(row, growth)
    try:
        runners = [make(0)]

        def call() -> None:
            runners[0].run(row.backward)

        error = None
        if warm_up:  # compiles, makes handles
            found = runners[0].run(row.backward)
            error = None if check is None else check(found)
            del found
        peak = memory.measure_peak(call, device, longest=3 * session.seconds)
        once = measure.seconds(call, device) if warm_up else session.longest_call
        host = _host_seconds(call) if device == "cuda" else 0.0
        launches = measure.count_launches(call, device)
        if input_bytes and once < session.seconds:
            turns = measure.rotations(input_bytes, device)
            runners += [make(seed) for seed in range(1, turns)]
    except RuntimeError as problem:  # torch.OutOfMemoryError is one
        if not _is_out_of_memory(problem):
            raise
        raise Absent("out of memory") from problem
    session.saw(row, once, peak.allocated)

    turn = iter(range(10**9))

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        runner = runners[next(turn) % len(runners)]
        measure.hide_launches(device, host)
        return (runner,), {}

    def measured(runner: Repeatable) -> None:
        runner.run(row.backward)

    least = 3 if once < 2 * session.seconds else 2 if warm_up else 1
    rounds = int(min(_MOST_ROUNDS, max(least, session.seconds / max(once, 1e-9))))
    title = row.as_dict()
    benchmark.group = f"{row.subject} {title['direction']}: {row.case}"
    benchmark.pedantic(measured, setup=setup, rounds=rounds, warmup_rounds=int(rounds > 2))

    benchmark.extra_info.update(
        title,
        **roofs,
        peak_extra_bytes=peak.allocated,
        peak_resident_bytes=peak.resident,
        launches=launches,
        error=error,
        input_sets=len(runners),
    )
    if floor is not None:
        benchmark.extra_info.update(
            floor_bytes=floor.bytes,
            flops=floor.flops,
            floor_seconds=floor.bytes / roofs["copy_bandwidth"],
        )


def _host_seconds(call: Callable[[], object]) -> float:
    """How long the host needs to launch a call, the GPU aside."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def _is_out_of_memory(problem: RuntimeError) -> bool:
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(problem, torch.OutOfMemoryError) or any(t in str(problem) for t in texts)


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> float:
    """The largest relative error of what both name; AssertionError where it exceeds ``bound``."""
    worst = 0.0
    for what in found.keys() & expected.keys():
        actual, exact = found[what].float(), expected[what].float()
        error = float((actual - exact).norm() / exact.norm())
        assert error < bound, f"{what} is wrong: relative error {error:.1e}, allowed {bound}"
        worst = max(worst, error)
    return worst


def run_operator(
    session: Session,
    benchmark: Any,
    case: Case,
    backward: bool,
    name: str,
    peer: Peer,
) -> None:
    """A row of an operator: the result is compared with the reference before it is timed."""
    reason = peer.why_not(case, session.device, backward)
    if reason:
        raise Absent(reason)

    first = make_inputs(case, session.device, 0)

    def make(seed: int) -> Runner:
        inputs = make_inputs(case, session.device, seed) if seed else first
        return peer.make(case, inputs, backward)

    floor = getattr(work, case.subject)(*first.arguments, backward=backward, **first.options)
    size = sum(tensor.nbytes for tensor in first.arguments)

    # A sign tips where image and reconstruction are equal to rounding: a few values are off by all.
    bound = BOUNDS[case.dtype] * (10 if case.subject == "residual_map" else 1)
    judge = backend_peer(case.subject, "reference")

    def reference() -> dict[str, Tensor]:
        reason = judge.why_not(case, session.device, backward)
        if reason:
            raise Absent(f"nothing to check it against: the reference is {reason}")
        inputs = make_inputs(case, session.device, 0)
        return judge.make(case, inputs, backward).run(backward)

    def samples() -> dict[str, Tensor]:
        return {"output 0": sampled.expected(make_inputs(case, session.device, 0))}

    def check(found: dict[str, Tensor]) -> float:
        if case.family == "global" and judge.why_not(case, session.device, backward):
            found = {"output 0": sampled.picked(found["output 0"])}
            return worst_error(found, session.expected(case, samples), bound)
        return worst_error(found, session.expected((case, backward), reference), bound)

    run_row(
        session,
        benchmark,
        Row.of(case, backward, name),
        make,
        floor=floor,
        check=check,
        growth=peer.growth(case),
        input_bytes=size,
    )
    gc.collect()

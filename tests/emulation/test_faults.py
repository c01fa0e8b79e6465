# SPDX-License-Identifier: Apache-2.0
"""The emulation names what is wrong with a kernel, and the line: each fault of ``faults.cu``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from grcsf_kernels import dispatch, native

pytestmark = pytest.mark.skipif(
    bool(dispatch.why_not(dispatch.EMULATED)),
    reason="needs the build of make emulate, which runs this file",
)

# What is said of each fault, and the text of the line that it names.
FAULTS = {
    "no_barrier": ("shared memory is read that (nothing|block 0, thread)", "space.get(from)"),
    "no_second_barrier": ("a race: .* is written that block 0, thread", "space.set(thread, value)"),
    "half_barrier": ("a barrier that not all threads reach: .* has ended", "sync_block()"),
    "two_barriers": ("a barrier that not all threads reach: .* waits at faults.cu", "sync_block()"),
    "unwritten": ("shared memory is read that nothing wrote", "space.get(from)"),
    "outside": ("values 64 to 65 are outside of an array of 64", "space.get(from)"),
    "too_little": ("256 bytes are taken, 64 were asked for", "arena.take<float>"),
    "too_much": ("invalid (configuration )?argument", ""),
    "inactive_lane": ("a shuffle that not all threads reach: .* has ended", "warp_sum(value)"),
    "diverged": ("a shuffle that not all threads reach: .* waits at faults.cu", "warp_sum(value)"),
    "no_warp_barrier": ("shared memory is read that (nothing|block 0, thread)", "space.get(other)"),
    "other_warp": ("shared memory is read that (nothing|block 0, thread)", "space.get(other)"),
    "not_waited": ("is read before its copy was waited for", "space.get(4"),
    "forgotten": ("a copy to shared memory that nothing waits for", "copy_async<4>"),
    "misaligned": ("a vector of 16 bytes is not on a multiple of them", "copy_async<4>"),
}
GOOD = ["none", "none_of_shuffles", "none_of_warps", "none_of_copies"]
THREADS = 64


def run(fault: str) -> torch.Tensor:
    library = native.library()
    values, out = torch.arange(4.0 * THREADS), torch.full((THREADS,), torch.nan)
    library.run_fault(library.faults[fault], native.capsule(values), native.capsule(out), THREADS)
    return out


def test_all_faults_are_tried():
    assert set(native.library().faults) == {*FAULTS, *GOOD}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_line(fault):
    said, line = FAULTS[fault]
    with pytest.raises(RuntimeError, match=said) as caught:
        run(fault)
    if line:
        message = str(caught.value)
        assert re.search(r"\(block \d+, thread \d+, faults.cu:\d+\)$", message), message
        number = int(message.rpartition(":")[2].rstrip(")"))
        source = (Path(__file__).parent / "faults.cu").read_text().splitlines()
        assert line in source[number - 1], message


def test_what_is_right_runs_also_after_faults():
    thread = torch.arange(float(THREADS))
    assert torch.equal(run("none"), thread.roll(-1))
    sums = thread.view(2, 32).sum(dim=1, keepdim=True).expand(2, 32).flatten()
    assert torch.equal(run("none_of_shuffles"), sums)
    assert torch.equal(run("none_of_warps"), thread.view(-1, 2).flip(1).flatten())
    assert torch.equal(run("none_of_copies"), 4 * thread.flip(0))

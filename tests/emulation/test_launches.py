# SPDX-License-Identifier: Apache-2.0
"""Which launches a call makes, and how much of a multiprocessor they ask for: noted, not run.

``GRCSF_LAUNCHES=launches.json`` writes them, for ``python -m benchmarks.gpu.cuda_kernels``.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.kernel_cases import Call
from benchmarks.harness.cases import Case
from grcsf_kernels import dispatch, native

pytestmark = [
    pytest.mark.xdist_group("launches"),
    pytest.mark.skipif(
        bool(dispatch.why_not(dispatch.EMULATED)),
        reason="needs the build of make emulate, which runs this file",
    ),
]

_PAGE = Path(__file__).parents[2] / "docs/kernels.md"
# Consumer cards give a block no more.
_SHARED = 99 * 1024


def calls() -> list[Call]:
    """What the page lists: the targets' sizes, and for rcu its other ways."""
    found = []
    for operator in native.operators(dispatch.EMULATED):
        channels = 1 if operator == "residual_map" else 32
        found.append(Call(Case(operator, "main", (128,) * 3, channels, "bfloat16")))
        if operator == "rcu":
            found.append(Call(Case("rcu", "global", (128,) * 3, 32, "bfloat16", patch=None)))
    return found


def noted(call: Call) -> list[dict[str, object]]:
    """The launches of forward and backward, each kernel once."""
    library = native.library()
    module = importlib.import_module(f"grcsf_kernels.native.{call.case.subject}")
    tensors = [
        torch.empty_like(t, device="cpu") if isinstance(t, torch.Tensor) else t
        for t in call.tensors("meta")
    ]
    library.forget_launches(only_note=True)
    try:
        call.run(module, tensors)
        launched = library.launches()
    finally:
        library.forget_launches(only_note=False)
    title = f"{call.case.subject} {call.title}"
    found = {}
    for kernel, blocks, threads, shared in launched:
        row = {"call": title, "kernel": kernel, "blocks": blocks, "threads": threads}
        found.setdefault(kernel, row | {"shared": shared})
    return list(found.values())


@pytest.fixture(scope="module")
def launches() -> list[dict[str, object]]:
    return [launch for call in calls() for launch in noted(call)]


def test_launches_are_those_of_the_page(launches):
    if "GRCSF_LAUNCHES" in os.environ:
        Path(os.environ["GRCSF_LAUNCHES"]).write_text(json.dumps(launches, indent=1))
        return
    page = _PAGE.read_text()
    for launch in launches:
        cells = (launch["call"], f"`{launch['kernel']}`", f"{launch['blocks']:,}")
        row = "| " + " | ".join([*cells, str(launch["threads"]), f"{launch['shared']:,}"]) + " |"
        assert row in page, "write docs/kernels.md anew: see benchmarks/gpu/cuda_kernels.py"


def test_shared_memory_fits_every_card(launches):
    for launch in launches:
        assert launch["shared"] <= _SHARED, launch


# What networks have: one map channel, patches of 8.
_NETWORK = Case("rcu", "main", (24,) * 3, 32, "bfloat16")


def backward_is_one_kernel(case: Case, residual: bool = False) -> bool:
    """Whether rcu's backward takes a patch a block; else it makes passes over all voxels."""
    names = {launch["kernel"] for launch in noted(Call(case, options=(("residual", residual),)))}
    one, passes = "rcu_patch_backward" in names, {"rcu_values", "rcu_queries"} <= names
    assert one != passes, names
    return one


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        *(replace(_NETWORK, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")),
        replace(_NETWORK, channels=24),
        replace(_NETWORK, space=(13, 10, 24)),
        replace(_NETWORK, space=(64, 64), patch=16),
        replace(_NETWORK, space=(8,) * 3, patch=None),
    ],
    ids=str,
)
def test_backward_of_small_patches_is_one_kernel(case, residual):
    assert backward_is_one_kernel(case, residual)


@pytest.mark.parametrize(
    "case",
    [
        replace(_NETWORK, dtype="float64"),
        replace(_NETWORK, layout="channels_last"),
        replace(_NETWORK, channels=33),
        replace(_NETWORK, map_channels=2),
        replace(_NETWORK, patch=16),
        replace(_NETWORK, space=(24, 24, 20)),
    ],
    ids=str,
)
def test_backward_of_other_calls_makes_passes(case):
    assert not backward_is_one_kernel(case)

# SPDX-License-Identifier: Apache-2.0
"""Every peer computes what the reference computes; compilers are replaced by what they compile."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.cases import Case, make_inputs
from benchmarks.harness.rows import worst_error
from benchmarks.peers import backend_peer
from benchmarks.peers.rcu import volume_of, windows
from benchmarks.suites import bench_gcu, bench_rcu, bench_residual_map
from grcsf_kernels.dispatch import BACKENDS, why_not

PEERS = {"residual_map": bench_residual_map, "gcu": bench_gcu, "rcu": bench_rcu}
RUNS = [
    (operator, peer, backward)
    for operator, bench in PEERS.items()
    for peer in bench.PEERS
    for backward in (False, True)
    if not (peer in BACKENDS and why_not(peer, operator, "cpu"))
    if (peer, backward) != ("flex", True)  # it has no backward on CPU
]


def blocked(query, key, value, kernel_size, stride):
    """NATTEN's interface, [B, *S, heads, d], for stride = kernel size."""
    assert kernel_size == stride
    heads, width = query.shape[-2:]
    shape = torch.Size([query.shape[0], heads * width, *query.shape[1:-2]])
    parts = []
    for tensor in (query, key, value):
        volume = tensor.flatten(-2).movedim(-1, 1)
        tokens = windows(volume, list(kernel_size)).unflatten(2, (heads, width))
        parts.append(tokens.transpose(1, 2))
    out = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    return volume_of(out, list(kernel_size), shape).movedim(1, -1).unflatten(-1, (heads, width))


@pytest.fixture(autouse=True)
def no_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    natten = types.ModuleType("natten")
    natten.na3d = natten.na2d = blocked
    natten.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    monkeypatch.setitem(sys.modules, "natten", natten)


@pytest.mark.parametrize(("operator", "peer", "backward"), RUNS)
def test_peer_equals_the_reference(operator, peer, backward):
    if operator == "rcu" and peer == "matrix":
        case = Case(operator, "global", (16, 16, 16), 8, patch=None, quick=True)
    else:
        case = Case(operator, "size", (32, 16, 16), 8, quick=True)
    found = PEERS[operator].PEERS[peer]
    device = "cuda" if peer == "natten" else "cpu"  # which it asks for; the stand-in does not
    case = replace(case, dtype="bfloat16") if peer == "natten" else case
    assert found.why_not(case, device, backward) == ""
    case = replace(case, dtype="float32")
    actual = found.make(case, make_inputs(case, "cpu", 0), backward).run(backward)
    exact = backend_peer(operator, "reference").make(case, make_inputs(case, "cpu", 0), backward)
    expected = exact.run(backward)
    assert "output 0" in actual
    if backward:
        data = {"residual_map": "prediction", "gcu": "skip", "rcu": "x"}[operator]
        assert f"gradient of {data}" in actual.keys() & expected.keys()
    assert worst_error(actual, expected, 1e-4) < 1e-4


def test_windows_and_back():
    volume = torch.randn(2, 3, 4, 6, 8)
    tokens = windows(volume, [2, 3, 4])
    assert tokens.shape == (2 * 8, 24, 3)
    assert torch.equal(volume_of(tokens, [2, 3, 4], volume.shape), volume)
    assert torch.equal(tokens[0, :, 1], volume[0, 1, :2, :3, :4].flatten())


def test_a_wrong_result_is_refused():
    exact = {"output 0": torch.ones(4)}
    with pytest.raises(AssertionError, match=r"output 0 is wrong: relative error 2\.0e-01"):
        worst_error({"output 0": torch.full((4,), 1.2)}, exact, 1e-4)

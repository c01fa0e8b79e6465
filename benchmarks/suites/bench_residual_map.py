# SPDX-License-Identifier: Apache-2.0
"""``residual_map``: every backend beside ``torch.compile``."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.cases import Case, all_cases
from benchmarks.harness.rows import Session, run_operator
from benchmarks.peers import Peer, backend_peers
from benchmarks.peers.compiled import compiled_peer

PEERS = backend_peers("residual_map") | {"compile": compiled_peer("residual_map")}


def cases(device: str) -> list[Case]:
    return all_cases("residual_map", device)


def peers(case: Case) -> dict[str, Peer]:
    return PEERS


def test_residual_map(
    session: Session, benchmark: Any, case: Case, backward: bool, peer: str
) -> None:
    run_operator(session, benchmark, case, backward, peer, PEERS[peer])

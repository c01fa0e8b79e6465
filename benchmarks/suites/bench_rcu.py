# SPDX-License-Identifier: Apache-2.0
"""``rcu``: every backend beside ``torch.compile`` and attention in textbook form."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.cases import Case, all_cases
from benchmarks.harness.rows import Session, run_operator
from benchmarks.peers import Peer, backend_peers
from benchmarks.peers.compiled import compiled_peer
from benchmarks.peers.rcu import PEERS as TEXTBOOK

PEERS = backend_peers("rcu") | {"compile": compiled_peer("rcu")} | TEXTBOOK


def cases(device: str) -> list[Case]:
    return all_cases("rcu", device)


def peers(case: Case) -> dict[str, Peer]:
    return PEERS


def test_rcu(session: Session, benchmark: Any, case: Case, backward: bool, peer: str) -> None:
    run_operator(session, benchmark, case, backward, peer, PEERS[peer])

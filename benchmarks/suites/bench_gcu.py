# SPDX-License-Identifier: Apache-2.0
"""``gcu``: every backend beside the definition under autograd and under ``torch.compile``."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.cases import Case, all_cases
from benchmarks.harness.rows import Session, run_operator
from benchmarks.peers import Peer, backend_peers
from benchmarks.peers.compiled import compiled_peer
from benchmarks.peers.gcu import PEERS as PLAIN

PEERS = backend_peers("gcu") | {"compile": compiled_peer("gcu")} | PLAIN


def cases(device: str) -> list[Case]:
    return all_cases("gcu", device)


def peers(case: Case) -> dict[str, Peer]:
    return PEERS


def test_gcu(session: Session, benchmark: Any, case: Case, backward: bool, peer: str) -> None:
    run_operator(session, benchmark, case, backward, peer, PEERS[peer])

# SPDX-License-Identifier: Apache-2.0
"""How the cost of each operator grows with the volume, up to 256³, for every peer.

``python -m benchmarks.report`` fits the exponent: 1 is linear in the voxels.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness.cases import Case, scaling_cases
from benchmarks.harness.rows import Session, run_operator
from benchmarks.peers import Peer
from benchmarks.suites import bench_gcu, bench_rcu, bench_residual_map

PEERS = {
    "residual_map": bench_residual_map.PEERS,
    "gcu": bench_gcu.PEERS,
    "rcu": bench_rcu.PEERS,
}


def cases(device: str) -> list[Case]:
    return [case for operator in PEERS for case in scaling_cases(operator, device)]


def peers(case: Case) -> dict[str, Peer]:
    return PEERS[case.subject]


def test_scaling(session: Session, benchmark: Any, case: Case, backward: bool, peer: str) -> None:
    run_operator(session, benchmark, case, backward, peer, PEERS[case.subject][peer])

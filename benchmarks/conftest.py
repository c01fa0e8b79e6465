# SPDX-License-Identifier: Apache-2.0
"""Options, fixtures and hooks of the benchmarks."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Last, so that an installed package comes before the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import grcsf_kernels
from benchmarks.harness import measure, results
from benchmarks.harness.rows import Absent, Row, Session

_DIRECTIONS = {False: "forward", True: "training"}
_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grcsf benchmarks")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure (default: the GPU where there is one)",
    )
    group.addoption("--quick", action="store_true", help="few cases, few rounds: minutes")
    group.addoption("--longest-call", type=float, help="seconds; slower calls are left out")


def pytest_configure(config: pytest.Config) -> None:
    device, quick = config.getoption("device"), config.getoption("quick")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    config.stash[_SESSION] = Session(
        device,
        seconds=0.3 if quick else 1.0,
        longest_call=config.getoption("longest_call") or (10 if quick else 30),
        memory=int(0.85 * results.free_memory(device)),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case, direction and peer that the file of a benchmark names."""
    if "case" not in metafunc.fixturenames:
        return
    module, config = metafunc.module, metafunc.config
    cases = module.cases(config.getoption("device"))
    if config.getoption("quick"):
        cases = [case for case in cases if case.quick]
    metafunc.parametrize(
        ("case", "backward", "peer"),
        [
            pytest.param(case, backward, peer, id=f"{case}-{_DIRECTIONS[backward]}-{peer}")
            for case in cases
            for backward in case.directions
            for peer in module.peers(case)
        ],
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = measure.timer(config.getoption("device"))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer))


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """What the rows of this run share."""
    return request.config.stash[_SESSION]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A row that can't be measured is reported and noted in the JSON, not failed."""
    try:
        return (yield)
    except Absent as absent:
        params = item.callspec.params  # type: ignore[attr-defined]
        row = Row.of(params["case"], params["backward"], params["peer"])
        item.config.stash[_SESSION].absent.append(row.as_dict() | {"reason": str(absent)})
        pytest.skip(str(absent))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Results are committed: the processor matters, the name of the host does not."""
    machine_info.pop("node", None)
    cpu = machine_info.get("cpu", {})
    for key in ("flags", "hz_actual", "hz_advertised", "hz_actual_friendly"):
        cpu.pop(key, None)
    machine_info["device"] = results.device_name(config.getoption("device"))
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = results.versions()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Quartiles instead of every sample, ratios to the peers, and what was left out."""
    session = config.stash[_SESSION]
    output_json["roofs"] = session.roofs()
    output_json["absent"] = session.absent
    output_json["quick"] = config.getoption("quick")
    results.slim(output_json)


def pytest_report_header(config: pytest.Config) -> str:
    backends = [name for name, status in grcsf_kernels.backends().items() if status]
    today = datetime.date.today().isoformat()
    return (
        f"benchmarks on {results.device_name(config.getoption('device'))} ({today}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, backends {', '.join(backends)}"
    )

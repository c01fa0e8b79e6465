# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares."""

from __future__ import annotations


def pytest_benchmark_update_machine_info(config, machine_info):
    """Results are committed: the processor matters, the name of the host does not."""
    machine_info.pop("node", None)

# SPDX-License-Identifier: Apache-2.0
"""How long a training will take, said after its first steps."""

from __future__ import annotations

import time

# Not the first step: it also allocates, and compiles where that was asked for.
_FROM, _TO = 1, 3
# Below that it is worth no line.
_LONG = 2 * 3600


class Pace:
    """Measures the first steps of a run.

    Args:
        title: of what is trained.
        steps: that are left.
    """

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps = title, steps
        self._done, self._since = 0, 0.0

    def step(self, now: float | None = None) -> str | None:
        """Count a step; once, if all of them take hours, a line that says so.

        Args:
            now: seconds on a monotonic clock; None: the system's.
        """
        now = time.perf_counter() if now is None else now
        self._done += 1
        if self._done == _FROM:
            self._since = now
        if self._done != _TO:
            return None
        seconds = (now - self._since) / (_TO - _FROM)
        left = seconds * (self._steps - _TO)
        if left < _LONG:
            return None
        return (
            f"{self._title}: {self._steps} steps will take about {left / 3600:.0f} hours, at "
            f"{seconds:.1f} s a step; the defaults are for a GPU, and --preset small is for a CPU "
            "(its settings: grcsf config train --preset small)"
        )

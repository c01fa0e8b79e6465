# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report``; see ``report.py``."""

from __future__ import annotations

from benchmarks.report.report import main

if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""What compiles the kernels is in ``benchmarks``, a package of the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that an installed package comes before the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

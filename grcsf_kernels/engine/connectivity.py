# SPDX-License-Identifier: Apache-2.0
"""Which voxels are neighbors: those of one lesion."""

from __future__ import annotations

import numpy as np

NEIGHBORS = np.ones((3, 3, 3), dtype=bool)  # 26-connectivity

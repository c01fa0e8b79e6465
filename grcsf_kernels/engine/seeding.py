# SPDX-License-Identifier: Apache-2.0
"""Seeds of independent streams of random numbers."""

from __future__ import annotations

import numpy as np


def seed_of(*parts: int) -> int:
    """A well-mixed seed from several numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0])

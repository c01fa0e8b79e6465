# SPDX-License-Identifier: Apache-2.0
"""``python -m grcsf_kernels.cli``: the same as ``grcsf``."""

from __future__ import annotations

from grcsf_kernels.cli import main

if __name__ == "__main__":
    main()

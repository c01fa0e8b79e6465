# SPDX-License-Identifier: Apache-2.0
"""Settings of the operators' tests."""

from __future__ import annotations

import pytest

from grcsf_kernels.dispatch import why_not
from grcsf_kernels.triton import interpreting


@pytest.fixture(autouse=True)
def large_patches_are_smaller(monkeypatch):
    """On the interpreter, patches of 512 voxels and more take the path of large patches."""
    if interpreting() and not why_not("triton"):
        from grcsf_kernels.triton import rcu

        monkeypatch.setattr(rcu, "_PATCH_VOXELS", 512)

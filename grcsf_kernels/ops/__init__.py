# SPDX-License-Identifier: Apache-2.0
"""The three operators: schema, checks, autograd, fake kernels, autocast and dispatch.

Importing this package registers ``torch.ops.grcsf.*``.
"""

from __future__ import annotations

from grcsf_kernels.ops.gcu import gcu
from grcsf_kernels.ops.rcu import RCUWeights, rcu
from grcsf_kernels.ops.residual_map import residual_map

__all__ = ["RCUWeights", "gcu", "rcu", "residual_map"]

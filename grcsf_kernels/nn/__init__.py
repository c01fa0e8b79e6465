# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules around the operators, with ordinary parameters."""

from __future__ import annotations

from grcsf_kernels.masking import complementary_masks, random_masks
from grcsf_kernels.nn import convert
from grcsf_kernels.nn.compensated_unet import CompensatedUNet
from grcsf_kernels.nn.gcu import GCU
from grcsf_kernels.nn.rcu import RCU
from grcsf_kernels.nn.residual_maps import ResidualMaps
from grcsf_kernels.nn.squeeze_excitation import SqueezeExcitation

__all__ = [
    "GCU",
    "RCU",
    "CompensatedUNet",
    "ResidualMaps",
    "SqueezeExcitation",
    "complementary_masks",
    "convert",
    "random_masks",
]

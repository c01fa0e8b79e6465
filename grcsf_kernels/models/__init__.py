# SPDX-License-Identifier: Apache-2.0
"""The networks of GRCSF: a masked autoencoder, a residual U-Net, and both units on it."""

from __future__ import annotations

from grcsf_kernels.models.autoencoder import MaskedAutoencoder
from grcsf_kernels.models.grcsf import GRCSF
from grcsf_kernels.models.unet import ResidualUNet

__all__ = ["GRCSF", "MaskedAutoencoder", "ResidualUNet"]

# SPDX-License-Identifier: Apache-2.0
"""Residual maps of frozen masked autoencoders as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grcsf_kernels.masking import complementary_masks, masks_per_round, random_masks
from grcsf_kernels.ops import residual_map
from grcsf_kernels.ops.checks import check_option

_MASKS = {"random": random_masks, "complementary": complementary_masks}


class Autoencoder(Protocol):
    """What :class:`ResidualMaps` asks of an autoencoder."""

    patch_size: tuple[int, ...]
    normalized_target: bool

    def reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Prediction [B, L, P * C] of ``image`` [B, C, *S] with ``hidden`` [B, L] not seen."""


def rescale(maps: Tensor) -> Tensor:
    """Each map [*S] of ``maps`` [B, K, *S] to [0, 1] by its own range; a constant map to zeros.

    NaN and Inf are not hidden: a map with one of them has NaN.
    """
    low, high = maps.flatten(2).aminmax(dim=2)
    axes = [1] * (maps.ndim - 2)
    low, high = (bound.reshape(*bound.shape, *axes) for bound in (low, high))
    span = high - low
    scaled = (maps - low) / span.clamp(min=torch.finfo(maps.dtype).tiny)
    return torch.where(span == 0, 0, scaled)  # not span > 0: that is false for NaN


class ResidualMaps(nn.Module):
    """One residual map of the image for each masked autoencoder.

    The autoencoders are frozen: evaluation mode, no gradients.

    Args:
        autoencoders: one for each mask ratio, such as
            :class:`grcsf_kernels.models.MaskedAutoencoder`.
        mask_ratios: the share of patches that is hidden from each autoencoder.
        draws: masks for each sample and autoencoder.
        masking: ``"random"``: independent masks; ``"complementary"``: the draws of one round hide
            every patch equally often (2 masks at 50 %, 4 at 75 %), so that fewer passes cover
            everything; ``draws`` is then a multiple of the round.

    Raises:
        ValueError: numbers of autoencoders and mask ratios that differ, an unknown ``masking``, or
            draws that do not fit the round.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461).
    """

    def __init__(
        self,
        autoencoders: Sequence[nn.Module],
        mask_ratios: Sequence[float] = (0.5, 0.75),
        draws: int = 4,
        masking: str = "random",
    ) -> None:
        super().__init__()
        if len(autoencoders) != len(mask_ratios) or not mask_ratios:
            raise ValueError(
                f"ResidualMaps: {len(autoencoders)} autoencoders for mask_ratios "
                f"{tuple(mask_ratios)}, expected one autoencoder for each ratio"
            )
        check_option("ResidualMaps", "masking", masking, tuple(_MASKS))
        if draws < 1:
            raise ValueError(f"ResidualMaps: draws is {draws}, expected at least 1")
        if masking == "complementary":
            for ratio in mask_ratios:
                size = masks_per_round(ratio)
                if draws % size:
                    raise ValueError(
                        f"ResidualMaps: draws is {draws}, expected a multiple of {size}, the "
                        f"number of complementary masks at a mask ratio of {ratio}"
                    )
        self.autoencoders = nn.ModuleList(autoencoders).requires_grad_(False).eval()
        self.mask_ratios = tuple(mask_ratios)
        self.draws = draws
        self.masking = masking

    def train(self, mode: bool = True) -> ResidualMaps:
        """The module has no training mode: its autoencoders stay frozen in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Residual maps, each rescaled to [0, 1] per sample.

        Args:
            image: [B, C, *S]; sizes that the patches do not divide are padded for the autoencoder.
            generator: a CPU generator for the masks; the same seed gives the same masks on every
                device. None: torch's default generator.

        Returns:
            [B, K, *S] for K autoencoders, in the dtype of ``image``.
        """
        return rescale(self.raw(image, generator))

    @torch.no_grad()
    def raw(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The maps before they are rescaled, in units of the image: for windows of one volume."""
        maps = [
            self._map(autoencoder, ratio, image, generator)
            for autoencoder, ratio in zip(self.autoencoders, self.mask_ratios, strict=True)
        ]
        return torch.cat(maps, dim=1)

    def _map(
        self,
        autoencoder: nn.Module,
        ratio: float,
        image: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        patch: tuple[int, ...] = tuple(autoencoder.patch_size)  # type: ignore[arg-type]
        space = image.shape[2:]
        missing = [-size % step for size, step in zip(space, patch, strict=True)]
        # F.pad counts axes from the last; images are padded with zeros, which is air.
        padded = F.pad(image, [n for extra in reversed(missing) for n in (0, extra)])
        tokens = 1
        for size, step in zip(padded.shape[2:], patch, strict=True):
            tokens *= size // step
        hidden = _MASKS[self.masking](image.shape[0], tokens, ratio, self.draws, generator)
        hidden = hidden.to(image.device)
        prediction = torch.stack(
            [autoencoder.reconstruct(padded, mask) for mask in hidden]  # type: ignore[operator]
        )
        residual = residual_map(
            padded,
            prediction,
            hidden,
            patch_size=patch,
            normalized_target=bool(autoencoder.normalized_target),
        )
        inside = tuple(slice(size) for size in image.shape)
        return residual[inside].mean(dim=1, keepdim=True)

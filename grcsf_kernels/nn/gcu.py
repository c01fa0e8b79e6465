# SPDX-License-Identifier: Apache-2.0
"""The Global Compensation Unit as a module."""

from __future__ import annotations

from torch import Tensor, nn

from grcsf_kernels.nn.squeeze_excitation import SqueezeExcitation
from grcsf_kernels.ops import gcu
from grcsf_kernels.ops.checks import check_counts, check_option
from grcsf_kernels.ops.gcu import COMPENSATIONS


class GCU(nn.Module):
    """Strengthens a skip where the next deeper encoder feature can no longer express it.

    One module serves 2D and 3D. Where the channels differ, a 1x1 convolution maps ``deep`` to the
    channels of the skip before it is upsampled.

    Args:
        channels: channels C of the skip.
        deep_channels: channels of the deeper feature; None: the same.
        reduction: of both squeeze-and-excitation gates.
        compensation: ``"dissimilarity"`` or ``"similarity"``; see :func:`grcsf_kernels.gcu`.

    Raises:
        TypeError: a number that is no integer.
        ValueError: an unknown ``compensation``, or a number below 1.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461), global compensation
    unit.

    Example:
        >>> import torch, grcsf_kernels
        >>> unit = grcsf_kernels.nn.GCU(16, deep_channels=32)
        >>> unit(torch.randn(1, 16, 8, 8, 8), torch.randn(1, 32, 4, 4, 4)).shape
        torch.Size([1, 16, 8, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        deep_channels: int | None = None,
        *,
        reduction: int = 16,
        compensation: str = "dissimilarity",
    ) -> None:
        super().__init__()
        check_option("GCU", "compensation", compensation, COMPENSATIONS)
        deep_channels = channels if deep_channels is None else deep_channels
        check_counts("GCU", channels=channels, deep_channels=deep_channels, reduction=reduction)
        self.channels, self.deep_channels = channels, deep_channels
        self.compensation = compensation
        self.skip_gate = SqueezeExcitation(channels, reduction)
        self.deep_gate = SqueezeExcitation(channels, reduction)
        # Over flattened voxels, so that the number of spatial axes is free.
        self.project: nn.Module = (
            nn.Identity() if deep_channels == channels else nn.Conv1d(deep_channels, channels, 1)
        )

    def forward(
        self, skip: Tensor, deep: Tensor, return_map: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compensate ``skip``.

        Args:
            skip: [B, channels, *S].
            deep: [B, deep_channels, *S'], any size.
            return_map: also return the dissimilarity.

        Returns:
            The compensated skip [B, channels, *S]; with ``return_map`` also the dissimilarity
            [B, 1, *S].

        Raises:
            TypeError: an input is no tensor.
            ValueError: the channels of an input are not those of the module, or batch or number of
                spatial axes differ.
        """
        for name, tensor, channels in (
            ("skip", skip, self.channels),
            ("deep", deep, self.deep_channels),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"GCU: {name} is a {type(tensor).__name__}, expected a Tensor")
            if tensor.ndim not in (4, 5) or tensor.shape[1] != channels:
                raise ValueError(
                    f"GCU: {name} has shape {tuple(tensor.shape)}, expected [B, {channels}, H, W] "
                    f"or [B, {channels}, D, H, W]{self._hint()}"
                )
        if skip.ndim != deep.ndim or skip.shape[0] != deep.shape[0]:
            raise ValueError(
                f"GCU: deep has shape {tuple(deep.shape)}, expected the batch and number of axes "
                f"of skip, which has shape {tuple(skip.shape)}"
            )
        if self.deep_channels != self.channels:
            deep = self.project(deep.flatten(2)).unflatten(2, deep.shape[2:])
        compensated, dissimilarity = gcu(
            skip,
            deep,
            self.skip_gate(skip),
            self.deep_gate(deep),
            compensation=self.compensation,
        )
        return (compensated, dissimilarity) if return_map else compensated

    def _hint(self) -> str:
        if self.channels not in (2, 3):
            return ""
        return (
            f". The first argument of GCU({self.channels}, {self.deep_channels}) is the channels "
            "of the skip, not the number of spatial axes: GCU(channels, deep_channels) serves 2D "
            "and 3D"
        )

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        return f"{self.channels}, {self.deep_channels}, compensation={self.compensation!r}"

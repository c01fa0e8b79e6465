# SPDX-License-Identifier: Apache-2.0
"""The backbone: a residual encoder-decoder with skip connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grcsf_kernels.models.pretrained import record_arguments
from grcsf_kernels.ops.checks import check_counts

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _InstanceNorm(nn.Module):
    """Instance normalization that also takes a single voxel, as at the bottleneck of a small crop.

    ``torch.nn.InstanceNorm3d`` refuses that in training; here one voxel normalizes to the bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.instance_norm(
            x, self.weight, self.bias, None, None, True, 0.0, 1e-5, torch.backends.cudnn.enabled
        )


class _ResidualBlock(nn.Module):
    """Two normalized convolutions beside a shortcut."""

    shardable = True  # FSDP gathers the weights of one at a time

    def __init__(self, dims: int, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[dims]
        self.conv1 = convolution(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = _InstanceNorm(channels)
        self.conv2 = convolution(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = _InstanceNorm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = convolution(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(out)) + self.shortcut(x), 0.01)


def _level(dims: int, channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (_ResidualBlock(dims, channels, channels) for _ in range(blocks - 1))
    return nn.Sequential(_ResidualBlock(dims, channels_in, channels, stride), *rest)


class ResidualUNet(nn.Module):
    """A residual U-Net for volumes or images of any size.

    Level 0 has full resolution; each deeper level halves it (rounded up). The last level is the
    bottleneck.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        spatial_dims: 3 for volumes, 2 for images.
        channels: channels of each level, at least two levels.
        blocks_per_level: residual blocks at each level of the encoder and of the decoder.
        deep_supervision: give the deeper decoder levels heads too, which run in training only.

    Attributes:
        gradient_checkpointing: in training, compute the activations inside a level again in the
            backward pass instead of keeping them. No part of the model file.

    Raises:
        ValueError: sizes out of range.
    """

    gradient_checkpointing: bool = False

    @record_arguments
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        spatial_dims: int = 3,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        blocks_per_level: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if spatial_dims not in (2, 3):
            raise ValueError(f"{name}: spatial_dims is {spatial_dims}, expected 2 or 3")
        if isinstance(channels, int) or len(channels) < 2:
            raise ValueError(f"{name}: channels is {channels}, expected at least two levels")
        check_counts(
            name,
            in_channels=in_channels,
            out_channels=out_channels,
            blocks_per_level=blocks_per_level,
            **{f"channels[{level}]": own for level, own in enumerate(channels)},
        )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.channels = tuple(channels)
        dims, blocks = spatial_dims, blocks_per_level
        shallower = (in_channels, *channels[:-1])
        self.encoder = nn.ModuleList(
            _level(dims, before, own, 1 if level == 0 else 2, blocks)
            for level, (before, own) in enumerate(zip(shallower, channels, strict=True))
        )
        pairs = list(pairwise(channels))
        self.up = nn.ModuleList(
            _TRANSPOSED[dims](deeper, own, 2, 2, bias=False) for own, deeper in pairs
        )
        self.decoder = nn.ModuleList(_level(dims, 2 * own, own, 1, blocks) for own, _ in pairs)
        self.head = _CONVOLUTIONS[dims](channels[0], out_channels, 1)
        # Of decoder levels 1, 2, ...
        self.deep_heads = nn.ModuleList(
            _CONVOLUTIONS[dims](own, out_channels, 1) for own in channels[1:-1] if deep_supervision
        )

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of every level, the bottleneck last.

        Raises:
            ValueError: the image is not [B, in_channels, *S].
        """
        expected = self.in_channels
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != expected:
            axes = "D, H, W" if self.spatial_dims == 3 else "H, W"
            raise ValueError(
                f"{type(self).__name__}: image has shape {tuple(image.shape)}, "
                f"expected [B, {expected}, {axes}]"
            )
        features = []
        for level in self.encoder:
            image = self._run(level, image)
            features.append(image)
        return features

    def decode(
        self,
        features: Sequence[Tensor],
        after: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """Logits from the features of every level; see :meth:`forward`.

        Args:
            features: skips, and the bottleneck last.
            after: called with the level and the decoder's output there; what it returns goes on.
        """
        x = features[-1]
        deep = []
        for level in reversed(range(len(self.decoder))):
            skip = features[level]
            up = self.up[level](x)
            # A level of odd size was rounded up on the way down.
            inside = tuple(slice(size) for size in skip.shape)
            up = up[inside]
            x = self._run(self.decoder[level], torch.cat([skip, up], dim=1))
            if after is not None:
                x = after(level, x)
            if level and self.training and self.deep_heads:
                deep.append(self.deep_heads[level - 1](x))
        logits = self.head(x)
        return [logits, *reversed(deep)] if deep else logits

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits [B, out_channels, *S] of ``image`` [B, in_channels, *S].

        In training with ``deep_supervision`` a list: those, and the logits of each deeper decoder
        level at its own resolution.
        """
        return self.decode(self.encode(image))

    def _run(self, unit: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(unit, *inputs, use_reentrant=False)
        return unit(*inputs)

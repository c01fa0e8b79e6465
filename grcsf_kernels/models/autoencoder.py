# SPDX-License-Identifier: Apache-2.0
"""A masked autoencoder for volumes and images."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grcsf_kernels.masking import random_masks
from grcsf_kernels.models.pretrained import Pretrained
from grcsf_kernels.ops.checks import check_counts
from grcsf_kernels.patches import patchify


class _QueryKeyValue(nn.Linear):
    """The combined projection, which begins with equal keys and queries whatever resets it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "heads"):  # else torch is making the layer, and begin_equal() follows
            self.begin_equal()

    def begin_equal(self) -> None:
        """Begin with equal keys and queries: a token looks at those like it, so at its neighbors.

        With independent ones a small autoencoder spends its training on a mean head by place and
        hardly learns to look at the image (docs/study.md).

        Source: Trockman & Kolter, ICML 2023, arXiv 2305.09828.
        """
        width = self.in_features
        # A normalized token's score with itself is 12 in the mean, whatever the width of a head.
        deviation = (12 / (width * (width / self.heads) ** 0.5)) ** 0.5
        query = torch.empty_like(self.weight[:width]).normal_(std=deviation)
        with torch.no_grad():
            self.weight[: 2 * width] = query.repeat(2, 1)
            self.bias[: 2 * width] = 0


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _QueryKeyValue(width, heads)
        self.project = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.qkv.begin_equal()

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A transformer block with normalization first."""

    shardable = True  # FSDP gathers the weights of one at a time

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


def sincos_positions(grid: Sequence[int], width: int, base: float, device: torch.device) -> Tensor:
    """Fixed positions [L, width] of a patch grid: sines and cosines of each axis side by side.

    Wavelengths of an axis grow geometrically from 2 pi patches to 2 pi ``base``.
    """
    per_axis = width // (2 * len(grid))
    rates = base ** -(torch.arange(per_axis, device=device, dtype=torch.float32) / per_axis)
    axes = torch.meshgrid(
        *(torch.arange(size, device=device, dtype=torch.float32) for size in grid), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * rates for axis in axes]
    positions = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(positions, (0, width - positions.shape[1]))


class MaskedAutoencoder(Pretrained):
    """A vision transformer that reconstructs the patches that it does not see.

    The encoder runs on the visible tokens only. Positions are fixed sines and cosines of the patch
    grid, so any size that the patches divide is accepted.

    Args:
        patch_size: voxels per axis, an integer or one for each axis.
        in_channels: channels C of the image.
        spatial_dims: 3 for volumes, 2 for images.
        embed_dim: width of the encoder, at least ``2 * spatial_dims``.
        depth: blocks of the encoder.
        num_heads: heads of the encoder, a divisor of ``embed_dim``.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: heads of the decoder, a divisor of ``decoder_dim``.
        mlp_ratio: hidden width of the blocks over their width.
        mask_ratio: the share of patches that is hidden in training.
        normalized_target: predict patches in units of their own mean and standard deviation.
        position_base: longest over shortest wavelength of the positions. The usual 10000 leaves
            most of them constant over a grid of a few patches an axis.

    Attributes:
        gradient_checkpointing: in training, compute the activations inside a block again in the
            backward pass instead of keeping them. No part of the model file.

    Raises:
        ValueError: sizes that do not fit.

    Source: He et al., CVPR 2022, arXiv 2111.06377.
    """

    gradient_checkpointing: bool = False
    legacy_defaults = MappingProxyType({"position_base": 10000.0})

    def __init__(
        self,
        patch_size: int | Sequence[int] = 16,
        in_channels: int = 1,
        *,
        spatial_dims: int = 3,
        embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        decoder_dim: int = 192,
        decoder_depth: int = 2,
        decoder_heads: int = 6,
        mlp_ratio: float = 4.0,
        mask_ratio: float = 0.75,
        normalized_target: bool = True,
        position_base: float = 10.0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"MaskedAutoencoder: spatial_dims is {spatial_dims}, expected 2 or 3")
        check_counts(
            "MaskedAutoencoder",
            in_channels=in_channels,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
        )
        for name, width, heads_name, heads in (
            ("embed_dim", embed_dim, "num_heads", num_heads),
            ("decoder_dim", decoder_dim, "decoder_heads", decoder_heads),
        ):
            if width % heads or width < 2 * spatial_dims:
                raise ValueError(
                    f"MaskedAutoencoder: {name} is {width}, expected a multiple of "
                    f"{heads_name} = {heads}, at least {2 * spatial_dims}"
                )
        if position_base <= 0:
            raise ValueError(
                f"MaskedAutoencoder: position_base is {position_base}, expected above 0"
            )
        sizes = [patch_size] * spatial_dims if isinstance(patch_size, int) else list(patch_size)
        if len(sizes) != spatial_dims or min(sizes) < 1:
            raise ValueError(
                f"MaskedAutoencoder: patch_size is {patch_size}, expected an integer >= 1 or one "
                f"for each of the {spatial_dims} axes"
            )
        self.patch_size: tuple[int, ...] = tuple(sizes)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.mask_ratio = mask_ratio
        self.normalized_target = normalized_target
        self.position_base = position_base

        values = prod(sizes) * in_channels
        self.embed = nn.Linear(values, embed_dim)
        self.encoder = nn.Sequential(
            *(_Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)),
            nn.LayerNorm(embed_dim),
        )
        self.bridge = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        self.decoder = nn.Sequential(
            *(_Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth)),
            nn.LayerNorm(decoder_dim),
        )
        self.predict = nn.Linear(decoder_dim, values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh mask token; the layers have a ``reset_parameters`` each."""
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, image: Tensor) -> Tensor:
        """Tokens [B, L, P * C] of ``image`` [B, C, *S]: voxel slow, channel fast.

        Raises:
            ValueError: the shape of the image does not fit the patches or the channels.
        """
        grid = self._grid(image)
        assert grid
        return patchify(image, self.patch_size)

    def target(self, image: Tensor) -> Tensor:
        """What :meth:`reconstruct` is to give for ``image`` [B, C, *S]: float32 [B, L, P * C].

        Raises:
            ValueError: the shape of the image does not fit the patches or the channels.
        """
        target = self.patchify(image).float()
        if self.normalized_target:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def encode(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Encoder output [B, L_visible, embed_dim] of the visible patches (all without a mask).

        Args:
            image: [B, C, *S].
            hidden: [B, L] bool, equally many hidden in each sample; those are left out.
        """
        tokens = self.embed(self.patchify(image))
        tokens = tokens + self._positions(image, tokens)
        if hidden is not None:
            shown = self._visible(hidden, tokens)
            tokens = tokens.gather(1, shown[..., None].expand(-1, -1, tokens.shape[-1]))
        return self._run(self.encoder, tokens)

    def reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Prediction [B, L, P * C] of all patches from those that are not hidden.

        Args:
            image: [B, C, *S].
            hidden: [B, L] bool, true where the encoder must not see the patch; equally many in
                each sample.

        Returns:
            The prediction in the token order of :func:`grcsf_kernels.residual_map`; in units of the
            patches' own mean and standard deviation with ``normalized_target``.

        Raises:
            ValueError: shapes that do not fit, or masks that hide different numbers of patches.
        """
        encoded = self.bridge(self.encode(image, hidden))
        shown = self._visible(hidden, encoded)
        batch, patches = hidden.shape
        width = encoded.shape[-1]
        tokens = self.mask_token.to(encoded.dtype).expand(batch, patches, width)
        tokens = tokens.scatter(1, shown[..., None].expand(-1, -1, width), encoded)
        return self.predict(self._run(self.decoder, tokens + self._positions(image, tokens)))

    def forward(
        self,
        image: Tensor,
        hidden: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One training step's loss.

        Args:
            image: [B, C, *S], sizes divisible by the patch size.
            hidden: [B, L] bool; None: a random mask at ``mask_ratio``.
            generator: a CPU generator for the random mask.

        Returns:
            The loss (mean squared error over the hidden patches, a scalar), the prediction
            [B, L, P * C] and the mask [B, L].

        Raises:
            ValueError: shapes that do not fit.
        """
        if hidden is None:
            patches = prod(self._grid(image))
            hidden = random_masks(image.shape[0], patches, self.mask_ratio, 1, generator)[0]
            hidden = hidden.to(image.device)
        prediction = self.reconstruct(image, hidden)
        error = (prediction.float() - self.target(image)).square().mean(dim=-1)
        loss = (error * hidden).sum() / hidden.sum()
        return loss, prediction, hidden

    def _run(self, blocks: nn.Sequential, tokens: Tensor) -> Tensor:
        if not (self.training and self.gradient_checkpointing and torch.is_grad_enabled()):
            return blocks(tokens)
        for block in blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return tokens

    def _positions(self, image: Tensor, tokens: Tensor) -> Tensor:
        positions = sincos_positions(
            self._grid(image), tokens.shape[-1], self.position_base, tokens.device
        )
        return positions.to(tokens.dtype)

    def _grid(self, image: Tensor) -> list[int]:
        space = image.shape[2:]
        fits = image.ndim == self.spatial_dims + 2 and image.shape[1] == self.in_channels
        if not fits or any(s % p for s, p in zip(space, self.patch_size, strict=True)):
            raise ValueError(
                f"MaskedAutoencoder: image has shape {tuple(image.shape)}, expected "
                f"[B, {self.in_channels}, *S] with {self.spatial_dims} axes divisible by "
                f"{self.patch_size}"
            )
        return [size // patch for size, patch in zip(space, self.patch_size, strict=True)]

    @staticmethod
    def _visible(hidden: Tensor, tokens: Tensor) -> Tensor:
        """Indices [B, L_visible] of the patches that are shown, in grid order."""
        if hidden.ndim != 2 or hidden.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"MaskedAutoencoder: hidden has shape {tuple(hidden.shape)}, "
                f"expected [{tokens.shape[0]}, L]"
            )
        counts = (~hidden).sum(dim=1)
        if (counts != counts[0]).any():
            raise ValueError(
                f"MaskedAutoencoder: hidden leaves {counts.tolist()} patches visible, expected "
                "the same number in each sample"
            )
        return (~hidden).nonzero()[:, 1].view(hidden.shape[0], -1)

# SPDX-License-Identifier: Apache-2.0
"""The Region Compensation Unit as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grcsf_kernels.common.dtypes import compute_dtype
from grcsf_kernels.nn.layers import affine
from grcsf_kernels.nn.sparse_rcu import sparse_rcu
from grcsf_kernels.ops import RCUWeights, rcu
from grcsf_kernels.ops.checks import check_counts, check_maps, patch_tuple
from grcsf_kernels.ops.registration import without_autocast


class RCU(nn.Module):
    r"""Adds to decoder features what the residual maps of their patch say.

    The parameters are those of textbook cross-attention, for each map: projections ``query``,
    ``key``, ``value`` and ``output``, and one learnable ``map_weight``; and a scoring network
    (``score_hidden``, ``score_output``) on the means of the patch and on the context. They are
    absorbed into the few weights of :func:`grcsf_kernels.rcu` at every call, under autograd. The
    keys have no bias: it would cancel in the softmax. A layer with an adapter (LoRA), pruning,
    weight or spectral normalization, a parametrization, dynamic quantization of its weights or
    hooks is called, on unit vectors: what hooks see are those, not voxels.

    Args:
        channels: channels C of the features.
        num_maps: number of residual maps K.
        map_channels: channels c of a residual map.
        num_heads: heads h for each map.
        head_dim: width d of a head.
        patch_size: voxels per axis within which attention is taken, an integer or one for each
            axis; None: the whole volume.
        context_channels: channels of the global descriptor; None: none is used.
        score_channels: hidden units m of the scoring network.

    Attributes:
        score_threshold: in evaluation mode, patches with a lower importance score are left as they
            are, without attention. 0, the default: none is, and the result is exact. A patch with
            score s would have changed by s times what attention adds, so that the threshold bounds
            what is left out relative to that. Which patches remain is known at run time only:
            above 0 the module is not for ``torch.compile(fullgraph=True)`` or export.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size below 1.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461), region compensation
    unit.

    Example:
        >>> import torch, grcsf_kernels
        >>> unit = grcsf_kernels.nn.RCU(16, num_maps=2, patch_size=4)
        >>> unit(torch.randn(1, 16, 8, 8, 8), torch.rand(1, 2, 8, 8, 8)).shape
        torch.Size([1, 16, 8, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        num_maps: int = 2,
        *,
        map_channels: int = 1,
        num_heads: int = 4,
        head_dim: int = 8,
        patch_size: int | Sequence[int] | None = 8,
        context_channels: int | None = None,
        score_channels: int = 32,
    ) -> None:
        super().__init__()
        check_counts(
            "RCU",
            channels=channels,
            num_maps=num_maps,
            map_channels=map_channels,
            num_heads=num_heads,
            head_dim=head_dim,
            score_channels=score_channels,
            context_channels=1 if context_channels is None else context_channels,
        )
        if patch_size is not None:  # of one axis or of all; how many there are, the input says
            axes = len(patch_size) if isinstance(patch_size, Sequence) else 1
            patch_tuple("RCU", patch_size, axes if axes in (2, 3) else 3)
        self.channels, self.num_maps, self.map_channels = channels, num_maps, map_channels
        self.num_heads, self.head_dim = num_heads, head_dim
        self.patch_size = tuple(patch_size) if isinstance(patch_size, Sequence) else patch_size
        self.context_channels = context_channels
        self.score_threshold = 0.0

        width = num_heads * head_dim
        self.query = nn.ModuleList(nn.Linear(channels, width) for _ in range(num_maps))
        self.key = nn.ModuleList(
            nn.Linear(map_channels, width, bias=False) for _ in range(num_maps)
        )
        self.value = nn.ModuleList(nn.Linear(map_channels, width) for _ in range(num_maps))
        self.output = nn.ModuleList(nn.Linear(width, channels) for _ in range(num_maps))
        self.map_weight = nn.Parameter(torch.full((num_maps,), 1 / num_maps))
        described = channels + num_maps * map_channels
        self.score_hidden = nn.Linear(described + (context_channels or 0), score_channels)
        self.score_output = nn.Linear(score_channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights: those of the linear layers as torch has them."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.constant_(self.map_weight, 1 / self.num_maps)

    def forward(
        self,
        x: Tensor,
        maps: Tensor,
        context: Tensor | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compensate ``x``.

        Args:
            x: [B, channels, *S].
            maps: [B, num_maps, *S] or [B, num_maps, map_channels, *S]; cast to the dtype of x.
            context: [B, context_channels], a global descriptor of the backbone such as the pooled
                bottleneck; needed where the module was made with ``context_channels``.
            return_scores: also return the importance scores.

        Returns:
            The compensated features [B, channels, *S]; with ``return_scores`` also the scores
            [B, *G], G = ceil(S / patch_size).

        Raises:
            TypeError: an input is no tensor, such as a list of maps.
            ValueError: a shape that does not fit, or a context that is missing or not expected.
            RuntimeError: a layer that is not affine, such as an adapter with dropout in training.
        """
        self._check(x, maps, context)
        weights = self.absorbed(x, context)
        maps = maps.to(x.dtype)
        if self.score_threshold > 0 and not self.training:
            out, scores = sparse_rcu(x, maps, weights, self.patch_size, self.score_threshold)
        else:
            out, scores = rcu(x, maps, weights, patch_size=self.patch_size)
        return (out, scores) if return_scores else out

    def absorbed(self, x: Tensor, context: Tensor | None = None) -> RCUWeights:
        """The weights that :func:`grcsf_kernels.rcu` takes, from the module's parameters.

        Differentiable; computed in float32 (float64 for float64 ``x``), also under autocast.

        Args:
            x: [B, channels, *S], of which only the batch size, dtype and device are used.
            context: as in :meth:`forward`.

        Returns:
            The absorbed weights.
        """
        with without_autocast(x.device.type):
            return RCUWeights(*self._attention_weights(x), *self._score_weights(x, context))

    def _attention_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query_weight, query_bias, value_weight and value_bias: docs/operators.md, absorption."""
        like = x.new_empty((0,), dtype=compute_dtype(x.dtype))

        def stacked(name: str, features: int) -> tuple[Tensor, Tensor]:
            layers = getattr(self, name)
            found = [
                affine(f"RCU: {name}.{k}", layer, features, like) for k, layer in enumerate(layers)
            ]
            weights, biases = zip(*found, strict=True)
            return torch.stack(weights), torch.stack(biases)

        heads = (self.num_heads, self.head_dim)
        key, _ = stacked("key", self.map_channels)
        key = key.unflatten(1, heads) / self.head_dim**0.5
        query, query_bias = stacked("query", self.channels)
        query, query_bias = query.unflatten(1, heads), query_bias.unflatten(1, heads)
        value, inner_bias = stacked("value", self.map_channels)
        output, outer_bias = stacked("output", self.num_heads * self.head_dim)
        each = self.map_weight.to(like.dtype)

        value_weight = torch.einsum(
            "kxhd,khdc->kxhc", output.unflatten(2, heads), value.unflatten(1, heads)
        )
        value_bias = torch.einsum("kxw,kw->kx", output, inner_bias) + outer_bias
        return (
            torch.einsum("khdc,khdx->khcx", key, query),
            torch.einsum("khdc,khd->khc", key, query_bias),
            value_weight * each[:, None, None, None],
            value_bias * each[:, None],
        )

    def _score_weights(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scoring network; the context's part goes into its bias, one for each sample."""
        like = x.new_empty((0,), dtype=compute_dtype(x.dtype))
        described = self.channels + self.num_maps * self.map_channels
        features = described + (self.context_channels or 0)
        weight, bias = affine("RCU: score_hidden", self.score_hidden, features, like)
        hidden = bias.expand(x.shape[0], -1)
        if context is not None:
            hidden = hidden + context.to(like.dtype) @ weight[:, described:].T
        output, output_bias = affine("RCU: score_output", self.score_output, len(bias), like)
        return weight[:, :described], hidden, output[0], output_bias[0]

    def _check(self, x: Tensor, maps: Tensor, context: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"RCU: x is a {type(x).__name__}, expected a Tensor")
        check_maps("RCU", "maps", maps)
        if x.ndim not in (4, 5) or x.shape[1] != self.channels:
            raise ValueError(
                f"RCU: x has shape {tuple(x.shape)}, expected [B, {self.channels}, H, W] or "
                f"[B, {self.channels}, D, H, W]"
            )
        batch, _, *space = x.shape
        whole = (batch, self.num_maps, self.map_channels, *space)
        accepted = [whole] + [(batch, self.num_maps, *space)] * (self.map_channels == 1)
        if tuple(maps.shape) not in accepted:
            raise ValueError(
                f"RCU: maps has shape {tuple(maps.shape)}, "
                f"expected {' or '.join(map(str, reversed(accepted)))}"
            )
        expected = self.context_channels and (batch, self.context_channels)
        found = None if context is None else tuple(context.shape)
        if found != expected:
            raise ValueError(
                f"RCU: context is {found or 'missing'}, expected "
                f"{expected or 'none: the module was made without context_channels'}"
            )

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        return (
            f"{self.channels}, num_maps={self.num_maps}, num_heads={self.num_heads}, "
            f"patch_size={self.patch_size}"
        )

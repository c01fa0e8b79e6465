# SPDX-License-Identifier: Apache-2.0
"""GRCSF: the backbone with a GCU on every skip and RCUs in the decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grcsf_kernels.models.pretrained import Pretrained
from grcsf_kernels.models.unet import ResidualUNet
from grcsf_kernels.nn.unet_units import apply_gcus, decoder_hook, make_gcus, make_rcus
from grcsf_kernels.ops.checks import check_levels, check_maps


class GRCSF(ResidualUNet, Pretrained):
    """Global and Regional Compensation Segmentation Framework.

    With both switches off it is the plain backbone, parameter for parameter.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        spatial_dims: 3 for volumes, 2 for images.
        num_maps: residual maps K.
        channels: channels of each level of the backbone.
        blocks_per_level: residual blocks at each level.
        rcu_levels: decoder levels that get an RCU; 0 is full resolution.
        num_heads: heads of the RCU.
        head_dim: width of a head.
        patch_size: voxels of an RCU patch per axis, at the resolution of its level; None: all.
        reduction: of the squeeze-and-excitation gates.
        compensation: of the GCU, ``"dissimilarity"`` or ``"similarity"``.
        score_channels: hidden units of the RCU's scoring network.
        use_gcu: put a GCU on every skip.
        use_rcu: put RCUs at ``rcu_levels``.
        deep_supervision: give the deeper decoder levels heads too, which run in training only.

    Raises:
        TypeError: ``rcu_levels`` is no sequence of integers, or a size is no integer.
        ValueError: sizes out of range.

    Source: Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461, arXiv 2502.08675.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        spatial_dims: int = 3,
        num_maps: int = 2,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        blocks_per_level: int = 1,
        rcu_levels: Sequence[int] = (0,),
        num_heads: int = 4,
        head_dim: int = 8,
        patch_size: int | Sequence[int] | None = 8,
        reduction: int = 16,
        compensation: str = "dissimilarity",
        score_channels: int = 32,
        use_gcu: bool = True,
        use_rcu: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            spatial_dims=spatial_dims,
            channels=channels,
            blocks_per_level=blocks_per_level,
            deep_supervision=deep_supervision,
        )
        check_levels("GRCSF", rcu_levels)
        levels = range(len(channels) - 1)
        if any(level not in levels for level in rcu_levels):
            raise ValueError(
                f"GRCSF: rcu_levels is {tuple(rcu_levels)}, expected decoder levels from 0 to "
                f"{levels[-1]}"
            )
        self.use_gcu, self.use_rcu, self.num_maps = use_gcu, use_rcu, num_maps
        self.gcu = make_gcus(
            channels if use_gcu else (), reduction=reduction, compensation=compensation
        )
        self.rcu = make_rcus(
            channels,
            rcu_levels if use_rcu else (),
            num_maps,
            num_heads=num_heads,
            head_dim=head_dim,
            patch_size=patch_size,
            context_channels=channels[-1],
            score_channels=score_channels,
        )

    def forward(self, image: Tensor, maps: Tensor | None = None) -> Tensor | list[Tensor]:
        """Segment.

        Args:
            image: [B, in_channels, *S].
            maps: residual maps [B, num_maps, *S], as :class:`grcsf_kernels.nn.ResidualMaps`
                makes them; needed with ``use_rcu``, not used without.

        Returns:
            Logits [B, out_channels, *S]; in training with ``deep_supervision`` a list, see
            :meth:`ResidualUNet.forward`.

        Raises:
            TypeError: ``maps`` is no tensor, such as a list of maps.
            ValueError: a shape that does not fit, or no residual maps with ``use_rcu``.
        """
        features = self.encode(image)
        if self.use_rcu:
            if maps is not None:
                check_maps("GRCSF", "maps", maps)
            expected = (image.shape[0], self.num_maps, *image.shape[2:])
            if maps is None or tuple(maps.shape) != expected:
                found = "missing" if maps is None else tuple(maps.shape)
                raise ValueError(f"GRCSF: maps is {found}, expected {expected} (or use_rcu=False)")
        after = decoder_hook(self.rcu, maps, features, self._run)
        return self.decode(apply_gcus(self.gcu, features, self._run), after)

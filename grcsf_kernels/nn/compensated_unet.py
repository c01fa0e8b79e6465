# SPDX-License-Identifier: Apache-2.0
"""The units in the U-shaped networks of MONAI and nnU-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from grcsf_kernels.nn.adapters import adapter_of
from grcsf_kernels.nn.unet_units import apply_gcus, decoder_hook, make_gcus, make_rcus
from grcsf_kernels.ops.checks import check_levels, check_maps


class CompensatedUNet(nn.Module):
    """Another library's U-Net with a GCU on every skip and RCUs on decoder features.

    The last ``num_maps`` channels of the input are the residual maps; the network sees the channels
    before them. So whatever crops, flips, pads or slides windows over an image does it to the maps
    along with it, and no training loop or inferer needs to know of them.

    The network is a submodule as it came: ``model.network`` keeps its parameters under its own
    names, and ``model.network.load_state_dict(...)`` loads what was trained without the units.
    Nothing is kept between calls: compilation, data-parallel training and activation checkpointing
    work as for the network itself. Hooks on its containers that combine skips (MONAI's
    ``SkipConnection``, nnU-Net's decoder) are not called; those on layers are.

    Args:
        network: ``UNet``, ``DynUNet`` or ``SegResNet`` of MONAI, ``ResidualEncoderUNet`` or
            ``PlainConvUNet`` of nnU-Net's ``dynamic_network_architectures``, 2D or 3D; its
            ``in_channels`` are those of the image alone.
        num_maps: residual maps K; 0: the input is the image alone.
        use_gcu: put a GCU on every skip.
        rcu_levels: decoder levels that get an RCU; 0 is the finest. With none, the maps are split
            off and not used.
        num_heads: heads of the RCU.
        head_dim: width of a head.
        patch_size: voxels of an RCU patch per axis, at the resolution of its level; None: all.
        reduction: of the squeeze-and-excitation gates.
        compensation: of the GCU, ``"dissimilarity"`` or ``"similarity"``.
        score_channels: hidden units of the RCU's scoring network.

    Raises:
        TypeError: ``rcu_levels`` is no sequence of integers, or a size is no integer.
        ValueError: a network of another class, a level that the decoder does not have, or a size
            out of range.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461).

    Example:
        >>> import torch
        >>> from monai.networks.nets import UNet
        >>> from grcsf_kernels.nn import CompensatedUNet
        >>> plain = UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2))
        >>> model = CompensatedUNet(plain, num_maps=2)
        >>> image, maps = torch.randn(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16, 16)
        >>> model(torch.cat([image, maps], dim=1)).shape
        torch.Size([1, 2, 16, 16, 16])
    """

    def __init__(
        self,
        network: nn.Module,
        num_maps: int = 2,
        *,
        use_gcu: bool = True,
        rcu_levels: Sequence[int] = (0,),
        num_heads: int = 4,
        head_dim: int = 8,
        patch_size: int | Sequence[int] | None = 8,
        reduction: int = 16,
        compensation: str = "dissimilarity",
        score_channels: int = 32,
    ) -> None:
        super().__init__()
        check_levels("CompensatedUNet", rcu_levels)
        self._adapter = adapter_of(network)
        encoded, decoded = self._adapter.encoded(network), self._adapter.decoded(network)
        wrong = [level for level in rcu_levels if level not in range(len(decoded))]
        if wrong:
            have = f"0 to {len(decoded) - 1}" if decoded else "none: the decoder has no feature"
            raise ValueError(
                f"CompensatedUNet: rcu_levels is {tuple(rcu_levels)}, expected levels of "
                f"{type(network).__name__}'s decoder, {have}"
            )
        if num_maps < 0 or (rcu_levels and num_maps < 1):
            raise ValueError(
                f"CompensatedUNet: num_maps is {num_maps}, expected at least "
                f"{1 if rcu_levels else 0} with rcu_levels={tuple(rcu_levels)}"
            )
        self.network, self.num_maps = network, num_maps
        self.gcu = make_gcus(
            encoded if use_gcu else (), reduction=reduction, compensation=compensation
        )
        self.rcu = make_rcus(
            decoded,
            rcu_levels,
            num_maps,
            num_heads=num_heads,
            head_dim=head_dim,
            patch_size=patch_size,
            context_channels=encoded[-1],
            score_channels=score_channels,
        )

    def forward(self, x: Tensor) -> Any:
        """Segment.

        Args:
            x: [B, C + num_maps, *S]: the C channels of the image, then the residual maps, as
                :class:`grcsf_kernels.nn.ResidualMaps` or ``grcsf residuals`` makes them.

        Returns:
            What the network returns for the image: logits, stacked or listed with deep supervision.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: an input with no channel left for the image.
        """
        check_maps("CompensatedUNet", "x", x)
        if x.ndim not in (4, 5) or x.shape[1] <= self.num_maps:
            raise ValueError(
                f"CompensatedUNet: x has shape {tuple(x.shape)}, expected [B, C + "
                f"{self.num_maps}, H, W] or [B, C + {self.num_maps}, D, H, W]: the image's C "
                f"channels, then {self.num_maps} residual maps"
            )
        image, maps = x.split([x.shape[1] - self.num_maps, self.num_maps], dim=1)
        features = list(self._adapter.encode(self.network, image))
        after = decoder_hook(self.rcu, maps, features, nn.Module.__call__)
        return self._adapter.decode(
            self.network, apply_gcus(self.gcu, features, nn.Module.__call__), after
        )

# SPDX-License-Identifier: Apache-2.0
"""Adapters that run third-party U-Nets level by level.

A network that takes one image has no place where residual maps come in. An adapter calls the
network's own modules one after the other, so that units can stand between them: no module is
replaced, no hook is registered, and nothing is kept from one call for the next. Without units it
computes the network's own forward, to the bit; tests/nn/test_compensated_unet.py checks each.

Nothing here imports these libraries: a network's class says where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

After = Callable[[int, Tensor], Tensor]


class Adapter(Protocol):
    """What :class:`grcsf_kernels.nn.CompensatedUNet` needs to know of a network's class."""

    def encoded(self, network: Any) -> Sequence[int]:
        """Channels of the encoder's features; level 0 is the finest, the bottleneck is last."""

    def decoded(self, network: Any) -> Sequence[int]:
        """Channels of the decoder's features, level by level: those that can take an RCU."""

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        """The encoder's features."""

    def decode(self, network: Any, features: Sequence[Tensor], after: After) -> Any:
        """The network's output from skips and bottleneck.

        ``after`` is called with the level and the decoder's feature there; what it returns goes on.
        """


class _MonaiUNet:
    """``monai.networks.nets.UNet``: nested ``Sequential(down, SkipConnection(deeper), up)``.

    What ``up`` of level l makes is the decoder's feature of level l - 1; that of level 0 is the
    output.
    """

    def encoded(self, network: Any) -> Sequence[int]:
        return tuple(network.channels)

    def decoded(self, network: Any) -> Sequence[int]:
        return tuple(network.channels[:-2])

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        levels, bottom = self._levels(network)
        features = []
        for down, _ in levels:
            image = down(image)
            features.append(image)
        return [*features, bottom(image)]

    def decode(self, network: Any, features: Sequence[Tensor], after: After) -> Tensor:
        levels, _ = self._levels(network)
        x = features[-1]
        for level in reversed(range(len(levels))):
            x = levels[level][1](torch.cat([features[level], x], dim=1))
            if level:
                x = after(level - 1, x)
        return x

    def _levels(self, network: Any) -> tuple[list[tuple[nn.Module, nn.Module]], nn.Module]:
        """``down`` and ``up`` of every level, and the bottom layer."""
        levels, block = [], network.model
        for _ in range(len(network.channels) - 1):
            # CheckpointUNet wraps what is deeper once more; its down and up stay wrapped.
            if not isinstance(block, nn.Sequential):
                block = block.module
            down, skip, up = block
            levels.append((down, up))
            block = skip.submodule
        return levels, block


class _DynUNet:
    """``monai.networks.nets.DynUNet``, with its heads for deep supervision."""

    def encoded(self, network: Any) -> Sequence[int]:
        return tuple(network.filters)

    def decoded(self, network: Any) -> Sequence[int]:
        return tuple(network.filters[:-1])

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        features = []
        for layer in (network.input_block, *network.downsamples, network.bottleneck):
            image = layer(image)
            features.append(image)
        return features

    def decode(self, network: Any, features: Sequence[Tensor], after: After) -> Tensor:
        x, levels = features[-1], range(len(features) - 1)
        supervised = network.training and network.deep_supervision
        heads = list(network.deep_supervision_heads) if supervised else []
        outputs = []
        for level, layer in zip(reversed(levels), network.upsamples, strict=True):
            x = after(level, layer(x, features[level]))
            if 0 < level <= len(heads):
                outputs.append(heads[level - 1](x))
        out = network.output_block(x)
        if not supervised:
            return out
        size = out.shape[2:]
        return torch.stack([out, *(F.interpolate(o, size) for o in reversed(outputs))], dim=1)


class _SegResNet:
    """``monai.networks.nets.SegResNet``, whose skips are added."""

    def encoded(self, network: Any) -> Sequence[int]:
        return [network.init_filters * 2**level for level in range(len(network.blocks_down))]

    def decoded(self, network: Any) -> Sequence[int]:
        return self.encoded(network)[:-1]

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        return network.encode(image)[1]

    def decode(self, network: Any, features: Sequence[Tensor], after: After) -> Tensor:
        x, levels = features[-1], range(len(features) - 1)
        for level, up, layer in zip(
            reversed(levels), network.up_samples, network.up_layers, strict=True
        ):
            x = after(level, layer(up(x) + features[level]))
        return network.conv_final(x) if network.use_conv_final else x


class _NnUNet:
    """nnU-Net's ``ResidualEncoderUNet`` and ``PlainConvUNet``.

    With deep supervision, which nnU-Net switches at ``network.decoder.deep_supervision``, the
    output is a list, the finest first.
    """

    def encoded(self, network: Any) -> Sequence[int]:
        return tuple(network.encoder.output_channels)

    def decoded(self, network: Any) -> Sequence[int]:
        return tuple(network.encoder.output_channels[:-1])

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        return network.encoder(image)

    def decode(
        self, network: Any, features: Sequence[Tensor], after: After
    ) -> Tensor | list[Tensor]:
        decoder, x, outputs = network.decoder, features[-1], []
        levels = range(len(features) - 1)
        for level, up, stage, head in zip(
            reversed(levels), decoder.transpconvs, decoder.stages, decoder.seg_layers, strict=True
        ):
            x = after(level, stage(torch.cat((up(x), features[level]), dim=1)))
            if decoder.deep_supervision or level == 0:
                outputs.append(head(x))
        return outputs[::-1] if decoder.deep_supervision else outputs[0]


_ARCHITECTURES = "dynamic_network_architectures.architectures.unet"
_ADAPTERS: dict[str, Adapter] = {
    "monai.networks.nets.unet.UNet": _MonaiUNet(),
    "monai.networks.nets.dynunet.DynUNet": _DynUNet(),
    "monai.networks.nets.segresnet.SegResNet": _SegResNet(),
    f"{_ARCHITECTURES}.ResidualEncoderUNet": _NnUNet(),
    f"{_ARCHITECTURES}.PlainConvUNet": _NnUNet(),
}
# What an adapter replaces or calls: a subclass with its own would run as if it had none.
_METHODS = ("forward", "encode", "decode")


def adapter_of(network: nn.Module) -> Adapter:
    """The adapter of a network's class.

    Args:
        network: an instance of a class that is known here, or of a subclass with its forward.

    Raises:
        ValueError: any other network.
    """
    found = f"{type(network).__module__}.{type(network).__qualname__}"
    for base in type(network).__mro__:
        adapter = _ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is None:
            continue
        for method in _METHODS:
            own, known = getattr(type(network), method, None), getattr(base, method, None)
            if own is not known:
                raise ValueError(
                    f"CompensatedUNet: network is a {found} with a {method} of its own, "
                    f"expected that of {base.__qualname__}"
                )
        return adapter
    known_names = ", ".join(_ADAPTERS)
    raise ValueError(
        f"CompensatedUNet: network is a {found}, expected one of {known_names}; "
        "nn.GCU and nn.RCU can be called in the forward of any other"
    )

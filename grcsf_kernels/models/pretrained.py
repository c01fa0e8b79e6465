# SPDX-License-Identifier: Apache-2.0
"""Model files: what ``from_pretrained`` reads and ``save_pretrained`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

    from grcsf_kernels.engine.config import DataConfig


class Pretrained(nn.Module):
    """A network that can be written to a model file and read again. Needs the ``train`` extra.

    Attributes:
        config: the arguments that it was made with.
        absent: what arguments were in effect in model files that are older than they are.
        preprocessing: how images become its input, for
            :class:`grcsf_kernels.engine.preprocessing.Preprocessing`; None: not known.
        crop_size: voxels of its training crops, the windows of prediction; None: not known.
        residual_maps: what made the maps that it was trained with; None: not known.
    """

    config: dict[str, object]
    absent: Mapping[str, Any] = MappingProxyType({})
    preprocessing: DataConfig | None = None
    crop_size: tuple[int, ...] | None = None
    residual_maps: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, path: Path | str) -> Self:
        """Read a model file of ``grcsf train``, ``grcsf pretrain`` or :meth:`save_pretrained`.

        Args:
            path: the ``.safetensors`` file.

        Returns:
            The module in evaluation mode, on the CPU, with the attributes above.

        Raises:
            grcsf_kernels.engine.InputError: no such file, of another kind, or damaged.
        """
        # Here, because the engine imports the models.
        from grcsf_kernels.engine.checkpoint import load_model

        return load_model(Path(path), cls)

    def save_pretrained(
        self,
        path: Path | str,
        *,
        preprocessing: DataConfig | None = None,
        crop_size: tuple[int, ...] | None = None,
    ) -> Path:
        """Write a model file, whole. ``grcsf predict`` needs preprocessing and crop size in it.

        Args:
            path: the ``.safetensors`` file.
            preprocessing: None: the attribute.
            crop_size: None: the attribute.

        Returns:
            ``path``.
        """
        from grcsf_kernels.engine.checkpoint import save_checkpoint

        return save_checkpoint(
            Path(path),
            self,
            self.preprocessing if preprocessing is None else preprocessing,
            self.crop_size if crop_size is None else crop_size,
            self.residual_maps,
        )

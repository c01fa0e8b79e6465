# SPDX-License-Identifier: Apache-2.0
"""Networks that can be written to model files and read again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from grcsf_kernels.models.files import KINDS, load_model, save_checkpoint
from grcsf_kernels.models.inputs import DataConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained(nn.Module):
    """A network that can be written to a model file and read again. Needs the ``train`` extra.

    Attributes:
        config: the arguments that it was made with, defaults included, as JSON has them.
        legacy_defaults: values for arguments that older model files do not contain.
        preprocessing: how images become its input, for
            :class:`grcsf_kernels.engine.data.preprocessing.Preprocessing`; None: not known.
        crop_size: voxels of its training crops, the windows of prediction; None: not known.
        residual_maps: what made the maps that it was trained with; None: not known.
    """

    config: dict[str, object]
    legacy_defaults: Mapping[str, Any] = MappingProxyType({})
    preprocessing: DataConfig | None = None
    crop_size: tuple[int, ...] | None = None
    residual_maps: dict[str, Any] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Pretrained in cls.__bases__:  # not the classes that users derive from these
            KINDS[cls.__name__] = cls
            cls.__init__ = record_arguments(cls.__init__)  # type: ignore[method-assign]

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
        return save_checkpoint(
            Path(path),
            self,
            self.preprocessing if preprocessing is None else preprocessing,
            self.crop_size if crop_size is None else crop_size,
            self.residual_maps,
        )


def record_arguments(initialize: Callable[..., None]) -> Callable[..., None]:
    """A constructor that keeps its arguments as ``config``."""
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def recorded(self: Any, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options)  # first, for Python's own error of wrong arguments
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        _, *named = bound.arguments.items()
        self.config = {
            name: list(value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
            for name, value in named
        }

    return recorded

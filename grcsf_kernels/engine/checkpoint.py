# SPDX-License-Identifier: Apache-2.0
"""Model files (safetensors with their configuration inside) and resumable training states.

Neither is ever unpickled: weights are safetensors, and a training state is loaded by torch's
weights-only loader.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grcsf_kernels._version import __version__
from grcsf_kernels.engine.config import DataConfig, from_dict, to_dict
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.files import write_whole
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.models.pretrained import Pretrained

_KINDS: dict[str, type[Pretrained]] = {"GRCSF": GRCSF, "MaskedAutoencoder": MaskedAutoencoder}
Model = TypeVar("Model", bound=Pretrained)


@dataclass
class Checkpoint:
    """A model with what is needed to run it.

    Attributes:
        model: in evaluation mode, on the CPU.
        data: the preprocessing that it was trained with.
        crop_size: voxels of its training crops.
        maps: what made the residual maps that it was trained with (:func:`describe_maps`); None
            where that is not known.
    """

    model: nn.Module
    data: DataConfig
    crop_size: tuple[int, int, int]
    maps: dict[str, Any] | None = None


def save_checkpoint(
    path: Path,
    model: nn.Module,
    data: DataConfig | None,
    crop_size: tuple[int, ...] | None,
    maps: dict[str, Any] | None = None,
) -> Path:
    """Write a model file, whole.

    Args:
        path: the file.
        model: a GRCSF or a MaskedAutoencoder.
        data: the preprocessing that it was trained with; None: not known.
        crop_size: voxels of its training crops; None: not known.
        maps: what made its residual maps, from :func:`read_maps`.
    """
    description = {
        "kind": kind_of(type(model)),
        "config": model.config,
        "data": None if data is None else to_dict(data),
        "crop_size": None if crop_size is None else list(crop_size),
        "maps": maps,
        "version": __version__,
    }
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    metadata = {"grcsf": json.dumps(description)}
    return write_whole(path, lambda temporary: save_file(weights, temporary, metadata=metadata))


def load_checkpoint(path: Path, kind: str) -> Checkpoint:
    """Read a model file with all that is needed to run it on volumes.

    Args:
        path: the file.
        kind: ``"GRCSF"`` or ``"MaskedAutoencoder"``.

    Raises:
        InputError: as for :func:`load_model`; a file without preprocessing or crop size.
    """
    model = load_model(path, _KINDS[kind])
    data, size = model.preprocessing, model.crop_size
    if data is None or size is None or len(size) != 3:
        raise InputError(
            path,
            "has no preprocessing or no crop size of three axes",
            "give them to save_pretrained, or train with grcsf",
        )
    return Checkpoint(model, data, (size[0], size[1], size[2]), model.residual_maps)


def load_model(path: Path, cls: type[Model]) -> Model:
    """Read a model file: the module in evaluation mode, with its preprocessing as attributes.

    Args:
        path: the file.
        cls: ``GRCSF``, ``MaskedAutoencoder`` or a subclass.

    Raises:
        InputError: no such file, no model file of this library, truncated, of another kind, or
            with weights that do not fit its configuration.
    """
    description, weights = _read(Path(path))
    if description.get("kind") != kind_of(cls):
        raise InputError(
            path,
            f"holds a {description.get('kind')}, and a {kind_of(cls)} is expected here",
            "segmentation models come from grcsf train, autoencoders from grcsf pretrain",
        )
    return _build(Path(path), cls, description, weights)


def load_any(path: Path) -> Pretrained:
    """Read a model file of either kind; see :func:`load_model`."""
    description, weights = _read(Path(path))
    kind = str(description.get("kind"))
    if kind not in _KINDS:
        raise InputError(path, f"holds a {kind}", f"expected {' or '.join(_KINDS)}")
    return _build(Path(path), _KINDS[kind], description, weights)


def kind_of(cls: type[nn.Module]) -> str:
    """The name under which models of a class are written: that of the library's own class."""
    return next(base.__name__ for base in cls.__mro__ if base.__name__ in _KINDS)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a model file."""
    if not path.is_file():
        raise InputError(path, "does not exist", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            path,
            f"is no model file or is truncated ({' '.join(str(error).split())})",
            "expected a .safetensors file that grcsf wrote: copy it again",
        ) from error
    if "grcsf" not in metadata:
        raise InputError(path, "was not written by grcsf", "expected a model file of grcsf")
    try:
        return dict(json.loads(metadata["grcsf"])), weights
    except (ValueError, TypeError) as error:
        raise InputError(path, "has a damaged description", "copy it again") from error


def _build(
    path: Path, cls: type[Model], description: dict[str, Any], weights: dict[str, Tensor]
) -> Model:
    try:
        model = cls(**{**cls.absent, **description["config"]})
        model.load_state_dict(weights)
        data, size = description.get("data"), description.get("crop_size")
        model.preprocessing = None if data is None else from_dict(DataConfig, data, str(path))
        model.crop_size = None if size is None else tuple(int(voxels) for voxels in size)
        maps = description.get("maps")  # not in files of earlier versions
        model.residual_maps = None if maps is None else dict(maps)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:160]
        raise InputError(
            path,
            f"has weights or settings of another architecture ({problem})",
            f"use a file of grcsf-kernels {__version__}, or train again",
        ) from error
    return model.eval()


def save_state(path: Path, state: dict[str, Any]) -> Path:
    """Write a training state, whole."""
    return write_whole(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path, identity: str) -> dict[str, Any] | None:
    """A training state, or None where there is none yet.

    Args:
        path: the file.
        identity: the configuration that the run has; a state of another one is refused.

    Raises:
        InputError: the file is damaged, holds anything but tensors and plain values, or belongs to
            a run with other settings.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        problem = " ".join(str(error).split())[:120]
        raise InputError(
            path,
            f"is no training state, or a damaged one ({problem})",
            "remove it to train from the start",
        ) from error
    if not isinstance(state, dict) or state.get("identity") != identity:
        raise InputError(
            path,
            "belongs to a run with other settings or other cases",
            "use another output folder, or remove it to train from the start",
        )
    return state

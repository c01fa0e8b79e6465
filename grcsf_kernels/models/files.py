# SPDX-License-Identifier: Apache-2.0
"""Model files: safetensors with their configuration inside. They are never unpickled."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from grcsf_kernels._version import __version__
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.digests import tensors_digest
from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.common.finite import require_finite
from grcsf_kernels.common.settings import from_dict, to_dict
from grcsf_kernels.models.inputs import DataConfig, compare_maps

if TYPE_CHECKING:
    from grcsf_kernels.models.pretrained import Pretrained

# By the name in a model file; filled by the classes themselves.
KINDS: dict[str, type[Pretrained]] = {}
Model = TypeVar("Model", bound="Pretrained")
# Files that name a format have a checksum.
FORMAT = 2
_DIGEST = re.compile(r', "sha256": "([0-9a-f]{64})"\}\Z')
_FLOATS = ("F16", "BF16", "F32", "F64")
_LARGEST_CROP = 1 << 31  # voxels; no memory is claimed for what a damaged file asks


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

    Raises:
        InputError: a weight is NaN or infinite.
    """
    from safetensors.torch import save_file  # of the train extra

    description = {
        "kind": kind_of(type(model)),
        "config": model.config,
        "data": None if data is None else to_dict(data),
        "crop_size": None if crop_size is None else list(crop_size),
        "maps": maps,
        "version": __version__,
        "format": FORMAT,
    }
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    require_finite(path, weights.items(), "weights", "nothing is written: train again")
    text = json.dumps(description)
    # Inside the one entry: several would have another order in every file.
    digest = tensors_digest(weights.items(), text)
    metadata = {"grcsf": f'{text[:-1]}, "sha256": "{digest}"}}'}
    return write_whole(path, lambda temporary: save_file(weights, temporary, metadata=metadata))


def load_model(path: Path, cls: type[Model]) -> Model:
    """Read a model file: the module in evaluation mode, with its preprocessing as attributes.

    Args:
        path: the file.
        cls: ``GRCSF``, ``MaskedAutoencoder`` or a subclass.

    Raises:
        InputError: no such file, no model file of this library, truncated, of another kind, or
            with weights that do not fit its configuration.
    """

    def choose(kind: str) -> type[Model]:
        if kind != kind_of(cls):
            raise InputError(
                path,
                f"contains a {kind} model, expected a {kind_of(cls)}",
                "segmentation models come from grcsf train, autoencoders from grcsf pretrain",
            )
        return cls

    return _load(Path(path), choose)


def load_any(path: Path) -> Pretrained:
    """Read a model file of either kind; see :func:`load_model`."""

    def choose(kind: str) -> type[Pretrained]:
        if kind not in KINDS:
            raise InputError(path, f"contains a {kind} model", f"expected {' or '.join(KINDS)}")
        return KINDS[kind]

    return _load(Path(path), choose)


def kind_of(cls: type[nn.Module]) -> str:
    """The name under which models of a class are written: that of the library's own class."""
    return next(base.__name__ for base in cls.__mro__ if base.__name__ in KINDS)


def _load(path: Path, choose: Callable[[str], type[Model]]) -> Model:
    """Nothing of the weights is read before the header has been believed."""
    from safetensors import safe_open  # of the train extra

    if not path.is_file():
        raise InputError(path, "does not exist", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            description = _description(path, metadata)
            cls = choose(str(description.get("kind")))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            _expect_fitting(path, cls, description, shapes)
            weights = {name: file.get_tensor(name) for name in shapes}
    except InputError:
        raise
    except Exception as error:  # whatever the reader makes of bytes that are no model file
        raise InputError(
            path,
            f"is no model file or is truncated ({one_line(error)})",
            "expected a .safetensors file that grcsf wrote: copy it again",
        ) from error
    text = metadata["grcsf"]
    digest = _DIGEST.search(text)
    # Files of earlier versions have neither.
    if (digest or "format" in description) and (
        digest is None or digest[1] != tensors_digest(weights.items(), text[: digest.start()] + "}")
    ):
        raise InputError(path, "has another checksum than when it was written", "copy it again")
    require_finite(path, weights.items(), "weights", "train again, or use another file")
    try:
        model = cls(**{**cls.legacy_defaults, **description["config"]})
        model.load_state_dict(weights)
        data, size = description.get("data"), description.get("crop_size")
        model.preprocessing = None if data is None else from_dict(DataConfig, data, str(path))
        model.crop_size = None if size is None else _crop_size(size)
        maps = description.get("maps")  # not in files of earlier versions
        compare_maps(maps, maps, path)  # fails where something is missing in it
        model.residual_maps = None if maps is None else dict(maps)
    except InputError:
        raise
    except Exception as error:  # whatever a constructor makes of another version's settings
        raise _unfitting(path, one_line(error)) from error
    return model.eval()


def _description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "grcsf" not in metadata:
        raise InputError(path, "was not written by grcsf", "expected a model file of grcsf")
    try:
        description = json.loads(metadata["grcsf"])
    except (ValueError, RecursionError) as error:
        raise InputError(path, "has a damaged description", "copy it again") from error
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InputError(path, "has a damaged description", "copy it again")
    return description


def _crop_size(size: Any) -> tuple[int, ...]:
    """ValueError where it can't be the size of a crop."""
    fits = isinstance(size, list) and all(type(voxels) is int and voxels > 0 for voxels in size)
    if not fits or len(size) not in (2, 3) or math.prod(size) > _LARGEST_CROP:
        raise ValueError(f"crop_size is {size}")
    return tuple(size)


def _unfitting(path: Path, problem: str) -> InputError:
    return InputError(
        path,
        f"has weights or settings of another architecture ({problem})",
        f"use a file of grcsf-kernels {__version__}, or train again",
    )


def _expect_fitting(
    path: Path,
    cls: type[Pretrained],
    description: dict[str, Any],
    found: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Compare the network that the settings ask for with the file's header, without its memory.

    Raises:
        InputError: they do not fit.
    """
    if cls not in KINDS.values():
        return  # a class of the user's own may not be made without memory
    try:
        with torch.device("meta"), _at_most(2 * len(found) + 8):
            expected = cls(**{**cls.legacy_defaults, **description["config"]}).state_dict()
    except Exception as error:  # whatever a constructor makes of settings that are none
        raise _unfitting(path, one_line(error)) from error
    for name, tensor in expected.items():
        kind, shape = found.get(name, (None, ()))
        if kind is None:
            raise _unfitting(path, f"{name} is missing")
        if shape != tuple(tensor.shape):
            raise _unfitting(path, f"{name} is {shape}, expected {tuple(tensor.shape)}")
        if kind not in _FLOATS:
            raise _unfitting(path, f"{name} has type {kind}, expected one of {', '.join(_FLOATS)}")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise _unfitting(path, f"{unknown[0]} is unknown")


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Inside, this thread's modules get no more than ``count`` parameters: ValueError."""
    thread, made = threading.get_ident(), 0

    def register(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal made
        if threading.get_ident() == thread:
            made += 1
            if made > count:
                raise ValueError("its settings ask for more weights than it has")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()

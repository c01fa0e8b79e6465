# SPDX-License-Identifier: Apache-2.0
"""What made residual maps: written beside cached maps and into the segmentation model's file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.digests import tensors_digest
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.config import ResidualsConfig
from grcsf_kernels.engine.io.datasets import Case, residual_path
from grcsf_kernels.engine.io.fingerprint import Origin, image_digest, read_origin
from grcsf_kernels.engine.io.sources import obstacle, read_json
from grcsf_kernels.engine.report import warn

_FILE = "residuals.json"


def digest(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's weights."""
    return tensors_digest((name, t.cpu()) for name, t in model.state_dict().items())[:32]


def describe_maps(autoencoders: Sequence[nn.Module], config: ResidualsConfig) -> dict[str, Any]:
    """Mask ratio and weights of each map's autoencoder, in the order of the maps, and settings."""
    return {
        "autoencoders": [
            {"mask_ratio": model.mask_ratio, "weights": digest(model)} for model in autoencoders
        ],
        "draws": config.draws,
        "masking": config.masking,
        "overlap": config.overlap,
        "skip_air": config.skip_air,
        "precision": config.precision,
        "seed": config.seed,
    }


def save_maps(folder: Path, description: dict[str, Any]) -> None:
    """Write the description of the maps in a folder, whole; say where it replaces another one."""
    path = Path(folder) / _FILE
    try:
        before = read_maps(folder)
    except InputError as error:
        warn(f"{error}")
        before = None
    if before is not None and (changed := _changes(before, description)):
        warn(f"{path}: the maps there were made with {changed}; they are made again")
    text = json.dumps(description, indent=1)
    write_whole(path, lambda temporary: temporary.write_text(text))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, such as "overlap 0.5 (now 0.25)"; nothing where all is the same."""
    changes = [
        f"{name} {before.get(name)} (now {now[name]})"
        for name in ("draws", "masking", "overlap", "skip_air", "precision", "seed")
        if name in before and before[name] != now.get(name)
    ]
    if before["autoencoders"] != now["autoencoders"]:
        changes.append("other autoencoders")
    if not changes and before.get("run", now.get("run")) != now.get("run"):
        changes.append("another version or other model files")
    return ", ".join(changes)


def read_maps(folder: Path) -> dict[str, Any] | None:
    """The description of the maps in a folder; None where there is none (earlier versions).

    Raises:
        InputError: it is damaged.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        return None
    found = read_json(path, "the residuals.json of grcsf residuals")
    try:
        for one in found["autoencoders"]:
            if not (isinstance(one["mask_ratio"], float) and isinstance(one["weights"], str)):
                raise ValueError("a mask ratio or a hash of weights")
        if not {"draws", "masking", "overlap"} <= found.keys():
            raise ValueError("draws, masking or overlap")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(path, f"is damaged ({error})", "run grcsf residuals again") from error
    return dict(found)


class CachedMaps:
    """The residual maps of a folder, all made alike, and each from its own case's image.

    A run of ``grcsf residuals`` that was stopped leaves maps of two settings, and a name alone does
    not say that an image is still the one that maps were made from. The headers of the maps do.

    Args:
        folder: of :func:`grcsf_kernels.engine.cache_residuals`.

    Raises:
        InputError: its ``residuals.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.description = read_maps(folder)
        self._run = None if self.description is None else self.description.get("run")
        self._known: set[Case] = set()
        self._said = False

    def path(self, case: Case) -> Path:
        """The file with the maps of a case.

        Raises:
            InputError: it does not exist, or says that it was made with other settings than
                ``residuals.json``, or from another image.
        """
        path = residual_path(self.folder, case)
        if case in self._known:
            return path
        if (problem := obstacle(path)) is not None:
            raise InputError(path, problem[0], "run grcsf residuals on the same data first")
        origin = read_origin(path)
        if origin is None:
            self._say_unknown(path)
        else:
            self._check(path, origin, case)
        self._known.add(case)
        return path

    def _check(self, path: Path, origin: Origin, case: Case) -> None:
        again = "run grcsf residuals on this data, with this folder, to its end"
        if origin.run != self._expected():
            there = (self.folder / _FILE).is_file()
            others = f"{self.folder / _FILE} says" if there else "most of the maps beside it"
            raise InputError(path, f"was made with other settings or models than {others}", again)
        if origin.image != image_digest(case.images):
            raise InputError(path, f"was made from another image than {case.image}", again)

    def _expected(self) -> str:
        """The run that the maps should be of: where nothing says it, that of most of them."""
        if self._run is None:
            counts: Counter[str] = Counter()
            for path in sorted(self.folder.glob("*_residual.nii.gz")):
                with suppress(InputError):  # whoever uses that file is told
                    if (origin := read_origin(path)) is not None:
                        counts[origin.run] += 1
            self._run = counts.most_common(1)[0][0]
        return str(self._run)

    def _say_unknown(self, path: Path) -> None:
        if not self._said:
            warn(
                f"{path}: does not say from which image and by what it was made, and others may "
                "not either; maps of this version of grcsf residuals do"
            )
        self._said = True

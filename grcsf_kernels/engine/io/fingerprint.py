# SPDX-License-Identifier: Apache-2.0
"""Input fingerprints stored in NIfTI headers, used to skip finished cases.

The header rather than a file beside it: the two can't come apart, and processes that share a folder
have nothing to write together.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grcsf_kernels._version import __version__
from grcsf_kernels.common.settings import to_dict
from grcsf_kernels.engine.io.nifti import read_description, read_geometry
from grcsf_kernels.engine.io.sources import check_file, readable
from grcsf_kernels.engine.report import warn

# Settings that say where something is computed, or which files are wanted beside the mask.
_NEUTRAL = ("device", "accumulate", "memory_gb", "batch_size", "probabilities", "uncertainty")
_BLOCK = 1 << 22


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    # What is in it: the same image compressed again is the same image.
    with gzip.open(path) if packed else open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def image_digest(files: Sequence[Path]) -> str:
    """A hash of the content of an image, its channels in order; compressed or not is the same.

    Raises:
        InputError: a file that is missing or can't be read.
    """
    digest = hashlib.sha256()
    for path in files:
        check_file(path)
        with readable(path):
            digest.update(_digest(path))
    return digest.hexdigest()[:20]


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NEUTRAL
    }


@dataclass(frozen=True)
class Origin:
    """What the header of an output says of it.

    Attributes:
        run: a hash of version, settings and model files.
        image: :func:`image_digest` of the image.
    """

    run: str
    image: str

    @classmethod
    def of(cls, description: str) -> Origin | None:
        """The origin in a header's description; None: another program or an earlier version."""
        words = description.split()
        if len(words) != 5 or words[0] != "grcsf":
            return None
        return cls(words[2], words[3])


def read_origin(path: Path) -> Origin | None:
    """The origin in the header of a file, whose voxels are not looked at; None: not known.

    Raises:
        InputError: the file is missing, or has no header that can be read.
    """
    return Origin.of(read_geometry(path).header["descrip"].item().decode("latin-1"))


class Fingerprint:
    """Of the outputs of one run.

    Args:
        config: its settings.
        models: its model files.

    Attributes:
        run: a hash of both and of the version.
    """

    def __init__(self, config: Any, models: Iterable[Path]) -> None:
        digest = hashlib.sha256(__version__.encode())
        digest.update(json.dumps(_settings(to_dict(config)), sort_keys=True).encode())
        for path in models:
            digest.update(_digest(path))
        self.run = digest.hexdigest()[:16]
        self._digest = digest

    def of(self, name: str, images: Sequence[Path], maps: Path | None = None) -> str:
        """The description of the outputs of a case, for their headers (:class:`Origin`).

        Args:
            name: of the case.
            images: the files of its image.
            maps: the file of its residual maps, if one is read.

        Raises:
            InputError: a file that is missing or can't be read.
        """
        image = image_digest(images)
        digest = self._digest.copy()
        digest.update(f"{name}\n{image}\n".encode("utf-8", "surrogateescape"))
        if maps is not None:
            digest.update(image_digest([maps]).encode())
        # A header has room for 79 characters.
        return f"grcsf {__version__[:14]} {self.run} {image} {digest.hexdigest()[:20]}"


def is_finished(outputs: Iterable[Path], description: str) -> bool:
    """Whether all outputs are there, whole, and of this description.

    One that is damaged is said, and not finished.
    """
    found = True
    for path in outputs:
        if not path.is_file():
            found = False
        elif (text := read_description(path)) != description:
            if text is None:
                warn(f"{path}: is damaged, and made again")
            found = False
    return found

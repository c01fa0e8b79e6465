# SPDX-License-Identifier: Apache-2.0
"""What an output was made from: its header says it, and so a case that is done is known.

The header rather than a file beside it: the two can't come apart, and processes that share a folder
have nothing to write together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grcsf_kernels._version import __version__
from grcsf_kernels.engine.config import to_dict
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.volumes import read_description

# Settings that say where something is computed, or which files are wanted beside the mask.
_NEUTRAL = ("device", "accumulate", "memory_gb", "batch_size", "probabilities", "uncertainty")


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NEUTRAL
    }


class Fingerprint:
    """Of the outputs of one run.

    Args:
        config: its settings.
        models: its model files.
    """

    def __init__(self, config: Any, models: Iterable[Path]) -> None:
        self._run = hashlib.sha256(__version__.encode())
        self._run.update(json.dumps(_settings(to_dict(config)), sort_keys=True).encode())
        for path in models:
            self._run.update(_digest(path))

    def of(self, name: str, inputs: Iterable[Path]) -> str:
        """The description of the outputs of a case: by its name and the bytes of its files.

        Raises:
            InputError: a file that is missing or can't be read.
        """
        digest = self._run.copy()
        digest.update(name.encode())
        for path in inputs:
            try:
                digest.update(_digest(path))
            except OSError as error:
                raise InputError(path, f"can't be read ({error})", "check the path") from error
        return f"grcsf {__version__} {digest.hexdigest()[:40]}"


def is_finished(outputs: Iterable[Path], description: str) -> bool:
    """Whether all outputs are there, whole, and of this description."""
    return all(path.is_file() and read_description(path) == description for path in outputs)

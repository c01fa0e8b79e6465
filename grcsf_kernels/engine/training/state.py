# SPDX-License-Identifier: Apache-2.0
"""Resumable training states. They are never unpickled: torch's weights-only loader reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.digests import is_sealed, seal
from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.common.finite import require_finite, tensors_of
from grcsf_kernels.engine.identity import differences

_FORMAT = 2  # states that name a format have a checksum
_STATE = {"identity", "model", "average", "optimizer", "precision", "done", "total", "best"}


def save_state(path: Path, state: dict[str, Any]) -> Path:
    """Write a training state, whole, with a checksum at its end."""

    def write(temporary: Path) -> None:
        torch.save(state | {"format": _FORMAT}, temporary)
        seal(temporary)

    return write_whole(path, write)


def load_state(path: Path, identity: str) -> dict[str, Any] | None:
    """A training state, or None where there is none yet.

    Args:
        path: the file.
        identity: the configuration that the run has; a state of another one is refused.

    Raises:
        InputError: the file is damaged, holds anything but tensors and plain values or weights that
            are NaN or infinite, or belongs to a run with other settings: it says which.
    """
    if not path.is_file():
        return None
    remedy = "remove it to train from the start"
    try:
        sealed = is_sealed(path)
        if sealed is False:
            raise ValueError("its checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and state.keys() >= _STATE):
            raise ValueError("something else is in it")
        # States of earlier versions have neither.
        if sealed is None and "format" in state:
            raise ValueError("its checksum is missing")
    except Exception as error:  # whatever the reader makes of bytes that are no state
        problem = one_line(error)
        raise InputError(
            path, f"is no training state, or a damaged one ({problem})", remedy
        ) from error
    if state["identity"] != identity:
        which = differences(state["identity"], identity)
        raise InputError(
            path,
            f"belongs to a run with other settings or other cases ({which})",
            f"use another output folder, or {remedy}",
        )
    require_finite(path, tensors_of(state), "weights", remedy)
    return state

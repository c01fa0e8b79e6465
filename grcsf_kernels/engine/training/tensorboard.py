# SPDX-License-Identifier: Apache-2.0
"""TensorBoard logs: numbers, and pictures of validation cases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grcsf_kernels.common.errors import printable
from grcsf_kernels.engine.evaluation.figures import draw_overlay
from grcsf_kernels.engine.report import warn


class Logs:
    """Writes to a folder; does nothing where TensorBoard is not installed.

    A context manager: its thread ends with it.

    Args:
        folder: of the event files; made with the first entry.
        enabled: False on all processes but the first.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self._folder, self._enabled = Path(folder), enabled
        self._writer: Any = None

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            with suppress(OSError):  # of a full disk, which was said
                self._writer.close()
            self._writer = None

    def _write(self, entry: Callable[[Any], None]) -> None:
        """Make an entry; where that fails the training goes on without logs."""
        if not self._enabled:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder)
            entry(self._writer)
            self._writer.flush()
        except ImportError:
            self._enabled = False
        except OSError as error:
            self._enabled = False
            warn(f"{self._folder}: logs can't be written any more ({error}); the training goes on")

    def number(self, name: str, value: float, epoch: int) -> None:
        """A point of a curve."""
        self._write(lambda writer: writer.add_scalar(name, value, epoch))

    def overlay(
        self,
        name: str,
        image: NDArray[np.floating],
        label: NDArray[np.generic],
        prediction: NDArray[np.generic],
        epoch: int,
    ) -> None:
        """A validation case, as :func:`draw_overlay` draws it."""

        def entry(writer: Any) -> None:
            figure = draw_overlay(name, image, label, prediction)
            writer.add_figure(f"validation/{printable(name)}", figure, epoch)

        self._write(entry)

# SPDX-License-Identifier: Apache-2.0
"""The device and the precision that networks run in."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from grcsf_kernels.common.errors import InputError

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def make_fabric(device: str, precision: str = "32-true", **options: Any) -> Fabric:
    """One device, where ``options`` of Fabric name no others.

    Raises:
        InputError: the device or the precision is unknown, or not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("device", f"is {device!r}", "expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "is cuda, and torch sees no CUDA device", "use auto or cpu")
    if precision not in _PRECISIONS:
        expected = "expected 32-true, bf16-mixed or 16-mixed"
        raise InputError("precision", f"is {precision!r}", expected)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and precision == "16-mixed":
        raise InputError("precision", "is 16-mixed on the CPU", "use bf16-mixed or 32-true there")
    settings: dict[str, Any] = {"devices": 1, "accelerator": device} | options
    if not options:
        # One process, whatever Fabric makes of the variables of a SLURM job around it.
        settings["plugins"] = [LightningEnvironment()]
    if not options.get("plugins"):
        settings["precision"] = precision
    if device == "cuda" and settings["devices"] > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            "--nproc-per-node", f"is {settings['devices']}", f"expected at most {found}, its GPUs"
        )
    return Fabric(**settings)

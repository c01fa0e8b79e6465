# SPDX-License-Identifier: Apache-2.0
"""The training loop of pretraining and of training.

Everything random in a step follows from (seed, epoch, step) alone, so a run that was killed goes on
from its last finished epoch to the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from grcsf_kernels.engine.checkpoint import load_state, save_state
from grcsf_kernels.engine.config import OptimizationConfig
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.report import console

# step(model, epoch, step) -> loss, and what the batch was, for the message about a bad loss.
Step = Callable[[nn.Module, int, int], tuple[Tensor, str]]


def make_fabric(device: str, precision: str = "32-true") -> Fabric:
    """One device.

    Raises:
        InputError: the device or the precision is unknown, or not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("device", f"is {device!r}", "expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "is cuda, and torch sees no CUDA device", "use auto or cpu")
    if precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise InputError(
            "precision", f"is {precision!r}", "expected 32-true, bf16-mixed or 16-mixed"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and precision == "16-mixed":
        raise InputError("precision", "is 16-mixed on the CPU", "use bf16-mixed or 32-true there")
    return Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]


def seed_of(*parts: int) -> int:
    """A well-mixed seed from several numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0])


def learning_rate(config: OptimizationConfig, done: int) -> float:
    """After ``done`` steps: linear warm-up, then a cosine to 0."""
    total = config.epochs * config.steps_per_epoch
    warmup = min(round(config.warmup_epochs * config.steps_per_epoch), total // 2)
    if done < warmup:
        return config.learning_rate * (done + 1) / warmup
    along = (done - warmup) / max(total - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * along))


def fit(
    model: nn.Module,
    step: Step,
    config: OptimizationConfig,
    *,
    state_path: Path,
    identity: str,
    title: str,
    epoch_done: Callable[[nn.Module, int, float, float], float],
    log: Callable[[str, float, int], None] = lambda name, value, epoch: None,
) -> None:
    """Train ``model`` in place, from its last finished epoch if ``state_path`` has one.

    Args:
        model: the network.
        step: gives the loss of a step.
        config: epochs, batch, learning rate, device.
        state_path: written whole after every epoch.
        identity: of the run; a state with another one is refused.
        title: of the progress bar.
        epoch_done: called with the model, the epoch, its mean loss and the best score so far;
            writes what it wants and returns the best score.
        log: called with a name, a value and the epoch.

    Raises:
        InputError: a state that does not belong to this run, or a loss that is NaN or Inf.
    """
    fabric = make_fabric(config.device, config.precision)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    state = load_state(state_path, identity)
    first, best = 0, -math.inf
    if state is not None:
        model.load_state_dict(state["model"])
        wrapped_optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
        first, best = state["epoch"] + 1, state["best"]
        if 0 < first < config.epochs:
            console.print(f"{title}: going on after epoch {first} of {config.epochs}")
    with _progress() as progress:
        task = progress.add_task(title, total=config.epochs * config.steps_per_epoch, loss=math.nan)
        progress.update(task, completed=first * config.steps_per_epoch)
        for epoch in range(first, config.epochs):
            model.train()
            total = 0.0
            for index in range(config.steps_per_epoch):
                rate = learning_rate(config, epoch * config.steps_per_epoch + index)
                for group in wrapped_optimizer.param_groups:
                    group["lr"] = rate
                value = _one_step(fabric, wrapped, wrapped_optimizer, step, config, epoch, index)
                total += value
                progress.update(task, advance=1, loss=value)
            mean = total / config.steps_per_epoch
            log("loss", mean, epoch)
            model.eval()
            best = epoch_done(model, epoch, mean, best)
            save_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizer": wrapped_optimizer.state_dict(),
                    # The loss scale of 16-mixed; empty for the others.
                    "precision": fabric.strategy.precision.state_dict(),
                    "epoch": epoch,
                    "best": best,
                    "identity": identity,
                },
            )
    model.eval()


def _one_step(
    fabric: Fabric,
    model: Any,
    optimizer: Any,
    step: Step,
    config: OptimizationConfig,
    epoch: int,
    index: int,
) -> float:
    loss, batch = step(model, epoch, index)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"epoch {epoch + 1}, step {index + 1}",
            f"the loss is {value} on {batch}",
            "lower the learning rate, or look at the intensities of these cases; "
            "the last finished epoch is kept",
        )
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
    optimizer.step()
    return value


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=console,
    )

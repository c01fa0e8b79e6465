# SPDX-License-Identifier: Apache-2.0
"""The training loop of pretraining and of training.

Everything random in a step follows from (seed, epoch, step) alone, so a run that was killed goes on
from its last state to the same bits as one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from grcsf_kernels.common.atomic_files import remove_leftovers, saving
from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.common.finite import is_finite, require_finite, tensors_of
from grcsf_kernels.engine.config import OptimizationConfig
from grcsf_kernels.engine.report import console, warn
from grcsf_kernels.engine.training.distributed import (
    expect_same,
    gather,
    is_sharded,
    lost,
    on_first,
)
from grcsf_kernels.engine.training.ema import WeightAverage
from grcsf_kernels.engine.training.pace import Pace
from grcsf_kernels.engine.training.state import load_state, save_state
from grcsf_kernels.engine.training.steps import CropMaker, MicroBatch, load_steps

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# The same call meets the same numbers again.
_REMEDY = (
    "lower optimization.learning_rate, take optimization.precision 32-true, or look at the "
    "intensities of these cases: the same call would stop here again"
)


@dataclass
class Objective:
    """What is learned.

    Attributes:
        crops: gives one crop and the name of its case.
        loss_terms: of a micro-batch, whose crops are on the device: a tensor with gradients.
            The parts of all micro-batches of a step, over all processes, add up.
        loss: of the sum of the parts; None: the sum is the loss.
        epoch_done: called on the first process with the network as it is kept, the epoch and the
            best score so far; writes what it wants and returns the best score. Of sharded weights
            the network lies on the CPU.
    """

    crops: CropMaker
    loss_terms: Callable[[nn.Module, MicroBatch], Tensor]
    loss: Callable[[Tensor], Tensor] | None
    epoch_done: Callable[[nn.Module, int, float], float]


def learning_rate(config: OptimizationConfig, done: int) -> float:
    """After ``done`` steps: linear warm-up, then a cosine to 0."""
    total = config.epochs * config.steps_per_epoch
    warmup = min(round(config.warmup_epochs * config.steps_per_epoch), total // 2)
    if done < warmup:
        return config.learning_rate * (done + 1) / warmup
    along = (done - warmup) / max(total - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * along))


@contextmanager
def _translate_peer_failure(fabric: Fabric) -> Iterator[None]:
    """Turn a collective that failed because another process died into an InputError."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not lost(error):
            raise
        raise InputError(
            f"process {fabric.global_rank}",
            f"lost the other processes ({one_line(error)})",
            "look for the first error among theirs; the same call goes on from the last state",
        ) from error


class _Trainer:
    """A network in training. ``model`` has the names of the file, ``wrapped`` the strategy."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: OptimizationConfig,
        *,
        fabric: Fabric,
        state_path: Path,
        identity: str,
        title: str,
    ) -> None:
        self.model, self.objective, self.config, self.fabric = model, objective, config, fabric
        self.state_path, self.identity, self.title = state_path, identity, title
        self.done = 0  # steps
        self.total = 0.0  # of the losses of the running epoch
        self.best = -math.inf
        self.saved = 0  # steps that the state on the disk has
        # Read by the networks' forward; no parameter, and no part of the model file.
        model.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
        # Sharding changes a network's class and its weights; what is written is an ordinary one.
        self.ordinary = copy.deepcopy(model) if is_sharded(fabric) else model
        compiled: Any = torch.compile(model) if config.compile else model
        self.wrapped: Any = fabric.setup_module(compiled)
        self.optimizer: Any = fabric.setup_optimizers(
            torch.optim.AdamW(
                model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
            )
        )
        self.average = WeightAverage(model.parameters(), config.ema_decay)

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.config.epochs * self.config.steps_per_epoch

    @property
    def kept(self) -> str:
        """What is on the disk, for the message of a run that stops."""
        return f"the state after {self.saved} steps is kept" if self.saved else "no state is there"

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, whole on the first process."""
        average = None
        if self.average.decay:
            with self.average.applied():
                # Copies: the weights lie in the same memory.
                average = copy.deepcopy(get_model_state_dict(self.model, options=_WHOLE))
        return {
            "model": get_model_state_dict(self.model, options=_WHOLE),
            "average": average,
            "optimizer": get_optimizer_state_dict(
                self.model, self.optimizer.optimizer, options=_WHOLE
            ),
            # The loss scale of 16-mixed; empty for the others.
            "precision": self.fabric.strategy.precision.state_dict(),
            "done": self.done,
            "total": self.total,
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        options = StateDictOptions(full_state_dict=True)

        if state["average"] is not None:
            set_model_state_dict(self.model, state["average"], options=options)
            self.average.restart()
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.done, self.total, self.best = state["done"], state["total"], state["best"]
        self.saved = self.done

    def resume(self) -> None:
        """Load the state where there is one; the same on all processes."""
        on_first(self.fabric, lambda: remove_leftovers(self.state_path))
        remedy = (
            "give every process the same data and settings, and an output folder that they share"
        )
        expect_same(self.fabric, self.identity, "the run", remedy)
        state = load_state(self.state_path, self.identity)
        there = None if state is None else state["done"]
        expect_same(self.fabric, there, str(self.state_path), remedy)
        if state is None:
            return
        self.load(state)
        if self.done < self.steps:
            epoch, step = divmod(self.done, self.config.steps_per_epoch)
            where = f"epoch {epoch} of {self.config.epochs}"
            where += f" and {step} steps" if step else ""
            console.print(f"{self.title}: resuming after {where}")

    def expect_finite(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """InputError unless all weights are finite."""
        epoch, step = divmod(self.done - 1, self.config.steps_per_epoch)
        where = f"epoch {epoch + 1}, step {step + 1}"
        require_finite(where, named, "weights", f"{_REMEDY}; {self.kept}")

    def save(self) -> None:
        """Write the state, on the first process."""
        content = self.state() | {"identity": self.identity}

        def write() -> None:
            self.expect_finite(tensors_of(content))
            with saving(self.state_path):
                save_state(self.state_path, content)

        on_first(self.fabric, write)
        self.saved = self.done

    def end_epoch(self, epoch: int) -> None:
        """Hand the network, as it is kept, to the objective on the first process."""
        self.model.eval()
        with self.average.applied():
            if self.ordinary is not self.model:
                weights = get_model_state_dict(self.model, options=_WHOLE)
                if self.fabric.is_global_zero:
                    self.ordinary.load_state_dict(weights)
                    self.ordinary.eval()

            def look_and_keep() -> float:
                self.expect_finite(self.ordinary.state_dict().items())
                return self.objective.epoch_done(self.ordinary, epoch, self.best)

            self.best = on_first(self.fabric, look_and_keep)

    def train(self, log: Callable[[str, float, int], None]) -> None:
        """All steps that are left."""
        steps = load_steps(self.objective.crops, self.config, self.fabric, self.done)
        with _progress(disable=not self.fabric.is_global_zero) as progress:
            bar = progress.add_task(
                self.title, total=self.steps, completed=self.done, loss=math.nan
            )
            self.model.train()
            since, timed = time.perf_counter(), 0
            pace = Pace(self.title, self.steps - self.done)
            for micros in steps:
                epoch, index = micros[0].epoch, micros[0].step
                rate = learning_rate(self.config, self.done)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                value = _one_step(self, micros)
                self.done, self.total, timed = self.done + 1, self.total + value, timed + 1
                progress.update(bar, advance=1, loss=value)
                if line := pace.step():
                    warn(line)
                if index + 1 < self.config.steps_per_epoch:
                    every = self.config.checkpoint_every
                    if every and self.done % every == 0:
                        self.save()
                    continue
                log("loss", self.total / self.config.steps_per_epoch, epoch)
                log("learning rate", rate, epoch)
                log("seconds a step", (time.perf_counter() - since) / timed, epoch)
                self.end_epoch(epoch)
                self.total = 0.0
                self.save()
                self.model.train()
                since, timed = time.perf_counter(), 0
        self.model.eval()


def expect_own_states(fabric: Fabric, identities: dict[Path, str]) -> None:
    """Look at the states of all trainings of a run before any file of it is written.

    Args:
        fabric: of the run.
        identities: for each state's path the identity of its training.

    Raises:
        InputError: a state that does not belong to this run; all processes raise.
    """

    def look() -> None:
        for path, identity in identities.items():
            load_state(path, identity)

    on_first(fabric, look)


def fit(
    model: nn.Module,
    objective: Objective,
    config: OptimizationConfig,
    *,
    fabric: Fabric,
    state_path: Path,
    identity: str,
    title: str,
    log: Callable[[str, float, int], None] = lambda name, value, epoch: None,
) -> None:
    """Train ``model`` in place, from where ``state_path`` ends if there is one.

    Args:
        model: the network.
        objective: what it learns.
        config: epochs, batch, learning rate, device.
        fabric: of :func:`grcsf_kernels.engine.training.distributed.launch`.
        state_path: written whole after every epoch and every ``checkpoint_every`` steps.
        identity: of the run; a state with another one is refused.
        title: of the progress bar.
        log: called on the first process with a name, a value and the epoch.

    Raises:
        InputError: a state that does not belong to this run, a loss, gradient or weight that is NaN
            or Inf, a file that can't be written, or another process that is gone. With several
            processes, all raise. No state or model with such weights is written.
    """
    with _translate_peer_failure(fabric):
        trainer = _Trainer(
            model,
            objective,
            config,
            fabric=fabric,
            state_path=state_path,
            identity=identity,
            title=title,
        )
        trainer.resume()
        trainer.train(log)


def _one_step(run: _Trainer, micros: list[MicroBatch]) -> float:
    """The loss over all crops of the step, after a step of the optimizer down its gradient."""
    fabric, objective, wrapped = run.fabric, run.objective, run.wrapped
    batches = [dataclasses.replace(m, crops=fabric.to_device(m.crops)) for m in micros]
    # Where the loss is no sum, the gradient of a micro-batch depends on the parts of all of them: a
    # forward pass for the parts comes first.
    ahead = objective.loss is not None and len(batches) > 1
    parts: list[Tensor] = []
    whole = torch.zeros(())
    if ahead:
        with torch.no_grad():
            parts = [objective.loss_terms(wrapped, batch) for batch in batches]
        whole = _sum(fabric, parts)
    run.optimizer.zero_grad(set_to_none=True)
    for place, batch in enumerate(batches):
        last = place + 1 == len(batches)
        with fabric.no_backward_sync(wrapped, enabled=not last):
            part = objective.loss_terms(wrapped, batch)
            if not ahead:
                parts.append(part.detach())
                whole = _sum(fabric, parts) if last else whole
            # The value of the whole, with the gradient of this part of it.
            loss = (
                part if objective.loss is None else objective.loss(whole + (part - part.detach()))
            )
            # Strategies average gradients over processes; those of a sum add up.
            fabric.backward(loss * fabric.world_size)
    value = float(whole if objective.loss is None else objective.loss(whole))
    if not math.isfinite(value):
        bad = [m for m, part in zip(micros, parts, strict=True) if not is_finite(part)]
        raise _not_finite(run, micros, f"the loss is {value}", bad)
    found: Any = fabric.clip_gradients(
        wrapped, run.optimizer, max_norm=run.config.clip_norm, error_if_nonfinite=False
    )
    norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
    # 16-mixed passes over such a step and halves its scale, until there is nothing left to halve.
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
        raise _not_finite(run, micros, f"the norm of the gradient is {norm}", micros)
    run.optimizer.step()
    run.average.update()
    return value


def _not_finite(
    run: _Trainer, micros: list[MicroBatch], problem: str, bad: list[MicroBatch]
) -> InputError:
    """Of a step that is not taken: the same on every process, so that all of them stop."""
    gathered = gather(run.fabric, [micro.names for micro in bad])
    names = ", ".join(name for some in gathered for name in some)
    return InputError(
        f"epoch {micros[0].epoch + 1}, step {micros[0].step + 1}",
        f"{problem} on {names or 'the whole batch'}",
        f"{_REMEDY}; the step was not taken, {run.kept}",
    )


def _sum(fabric: Fabric, parts: list[Tensor]) -> Tensor:
    whole = fabric.all_reduce(torch.stack(parts).sum(dim=0), reduce_op="sum")
    assert isinstance(whole, Tensor)
    return whole


def _progress(*, disable: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )

# SPDX-License-Identifier: Apache-2.0
"""What the tests run in processes of their own: ``processes.py PART DATA FOLDER``."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from engine.conftest import pretrain_config, train_config

from grcsf_kernels import engine
from grcsf_kernels.engine.training import state
from grcsf_kernels.engine.training import trainer as loop

RANK = int(os.environ.get("RANK", "0"))


class Stop(Exception):
    """Stands for a kill that leaves this process alive."""


def segmentation(**changes):
    """Everything that a state has to keep: an average, levels of supervision, validation."""
    values = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 1, "ema_decay": 0.9}
    config = train_config(use_rcu=False, **(values | changes))
    config.model.deep_supervision = True
    config.validation_fraction, config.validation_every = 0.34, 2
    return config


def autoencoder(**changes):
    config = pretrain_config(**({"steps_per_epoch": 3, "ema_decay": 0.5} | changes))
    config.model.mask_ratios = (0.75,)
    return config


def record(run, before=lambda run: None):
    """The losses of the steps of ``run()``; ``before`` is called ahead of each."""
    losses, one_step = [], loop._one_step

    def step(run, micros):
        before(run)
        losses.append(one_step(run, micros))
        return losses[-1]

    loop._one_step = step
    try:
        run()
    finally:
        loop._one_step = one_step
    return losses


def parallel(data, folder):
    """Under torchrun: trains in every way that has more than one process."""
    found = {}
    found["train"] = record(lambda: engine.train(data, folder / "train", segmentation()))

    def stop(run):
        if run.done == 4:
            raise Stop

    # Stopped between two epochs' ends; a state lies one step before.
    part = segmentation(checkpoint_every=1)
    try:
        record(lambda: engine.train(data, folder / "part", part), stop)
    except Stop:
        found["again"] = record(lambda: engine.train(data, folder / "part", part))

    for strategy in ("ddp", "fsdp"):
        config = autoencoder(strategy=strategy, checkpoint_every=2)
        try:
            record(lambda c=config, s=strategy: engine.pretrain(data, folder / s, c), stop)
        except Stop:
            losses = record(lambda c=config, s=strategy: engine.pretrain(data, folder / s, c))
            found[strategy] = losses
    half = autoencoder(strategy="fsdp", precision="bf16-mixed")
    found["half"] = record(lambda: engine.pretrain(data, folder / "half", half))
    sharded = segmentation(strategy="fsdp")
    found["sharded"] = record(lambda: engine.train(data, folder / "sharded", sharded))

    wild = segmentation(learning_rate=1e30, steps_per_epoch=20)
    wild.optimization.clip_norm = 1e30
    try:
        engine.train(data, folder / "wild", wild)
    except engine.InputError as error:
        found["wild"] = str(error)

    # The command, on a folder with a bad case.
    sys.argv = ["grcsf", "train", f"{folder}/bad", "-o", f"{folder}/command"]
    sys.argv += ["-c", f"{folder}/train.yaml"]
    try:
        runpy.run_module("grcsf_kernels.cli", run_name="__main__")
    except SystemExit as end:
        found["status"] = end.code
    (folder / f"found{RANK}.json").write_text(json.dumps(found))

    # The end: the second process is killed in its third step.
    def die(run):
        if RANK == 1 and run.done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        record(lambda: engine.train(data, folder / "dead", segmentation(checkpoint_every=1)), die)
    except engine.InputError as error:
        (folder / "alone.txt").write_text(str(error))
        raise


def killed(data, folder):
    """Killed in the middle of the second epoch."""

    def die(run):
        if run.done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    record(lambda: engine.train(data, folder, interrupted()), die)


def killed_writing(data, folder):
    """Killed when half of a state is on the disk."""
    save = torch.save

    def half(state, path):
        save(state, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    state.torch.save = half
    engine.train(data, folder, interrupted())


def interrupted():
    return segmentation(steps_per_epoch=4, accumulate_batches=2, checkpoint_every=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))

# SPDX-License-Identifier: Apache-2.0
"""What stops a training leaves the run that is there as it was, and says what to do."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from engine.conftest import (
    make_autoencoders,
    make_model,
    pretrain_config,
    rewrite,
    train_config,
)
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.common import locks
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training import distributed
from grcsf_kernels.engine.training import trainer as loop
from grcsf_kernels.models import GRCSF


def content(folder):
    """Bytes and times of all files: nothing may be written, not even the same again."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def nan_gradient_at(monkeypatch, step, value=math.nan):
    """The loss stays finite, and a gradient of the given step does not."""
    one_step, backward = loop._one_step, Fabric.backward
    now = []

    def remember(run, micros):
        now[:] = [run]
        return one_step(run, micros)

    def spoiled(self, loss, *args, **options):
        backward(self, loss, *args, **options)
        if now[0].done == step:
            gradient = next(iter(now[0].model.parameters())).grad
            gradient[(0,) * gradient.ndim] = value

    monkeypatch.setattr(loop, "_one_step", remember)
    monkeypatch.setattr(Fabric, "backward", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [1.0, 1e30])
def test_a_gradient_that_is_not_finite_is_not_stepped_and_the_state_before_it_is_kept(
    folder, tmp_path, monkeypatch, value, clip_norm
):
    """In the last step of an epoch, after which the model and the state are written."""
    config = train_config(use_rcu=False, epochs=3, clip_norm=clip_norm, accumulate_batches=2)
    whole = engine.train(folder, tmp_path / "whole", config)
    nan_gradient_at(monkeypatch, 3, value)
    message = (
        rf"epoch 2, step 2: the norm of the gradient is {value} on case\d, case\d; .*"
        "the step was not taken, the state after 2 steps is kept"
    )
    for _ in range(2):  # the same call stops again, and destroys nothing
        with pytest.raises(InputError, match=message):
            engine.train(folder, tmp_path / "run", config)
        state = torch.load(tmp_path / "run/model.state", weights_only=True)
        assert state["done"] == 2
        assert all(values.isfinite().all() for values in state["model"].values())
    monkeypatch.undo()
    path = engine.train(folder, tmp_path / "run", config)
    assert path.read_bytes() == whole.read_bytes()


def test_weights_that_are_not_finite_are_never_written(folder, tmp_path, monkeypatch):
    """As a learning rate of inf makes them in the only step, whose loss is finite."""
    monkeypatch.setattr(loop, "learning_rate", lambda config, done: math.inf)
    config = train_config(use_rcu=False, epochs=1, steps_per_epoch=1)
    message = r"epoch 1, step 1: has weights that are NaN or infinite \(.*\); lower .*learning_rate"
    with pytest.raises(InputError, match=message):
        engine.train(folder, tmp_path / "run", config)
    assert not list((tmp_path / "run").glob("model*"))
    with pytest.raises(InputError, match=message):
        engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1, steps_per_epoch=1))
    assert not list((tmp_path / "mae").glob("mae*"))


@pytest.mark.parametrize("kind", ["average", "optimizer"])
def test_averages_that_are_not_finite_are_never_written(folder, tmp_path, monkeypatch, kind):
    state = loop._Trainer.state

    def spoiled(run):
        content = state(run)
        if run.done == 4:
            (name, values), *_ = loop.tensors_of(content[kind])
            assert name
            values.fill_(math.nan)
        return content

    monkeypatch.setattr(loop._Trainer, "state", spoiled)
    config = train_config(use_rcu=False, ema_decay=0.5)
    with pytest.raises(InputError, match=rf"epoch 2, step 2: .*\({kind}\..* after 2 steps is kept"):
        engine.train(folder, tmp_path / "run", config)
    assert torch.load(tmp_path / "run/model.state", weights_only=True)["done"] == 2


def test_half_precision_passes_over_a_step_and_gives_up_when_its_scale_is_used_up(
    folder, tmp_path, monkeypatch
):
    """With the loss scale of 16-mixed, which the CPU has for tests only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def half(config):
        return Fabric(
            devices=1, accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
        )

    monkeypatch.setitem(engine.train.__globals__, "launch", half)
    nan_gradient_at(monkeypatch, 1)
    config = train_config(use_rcu=False, use_gcu=False)
    engine.train(folder, tmp_path / "once", config)
    assert scaler.get_scale() == 2
    monkeypatch.undo()
    monkeypatch.setitem(engine.train.__globals__, "launch", half)
    backward = Fabric.backward

    def always(self, loss, *args, **options):
        backward(self, loss * math.inf, *args, **options)

    monkeypatch.setattr(Fabric, "backward", always)
    with pytest.raises(InputError, match="epoch 1, step 2: the norm of the gradient is"):
        engine.train(folder, tmp_path / "always", config)


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_refused_call_writes_nothing_and_says_which_settings_differ(folder, tmp_path, command):
    run = getattr(engine, command)

    def config(**changes):
        values = {"epochs": 1, "steps_per_epoch": 1} | changes
        own = pretrain_config(**values) if command == "pretrain" else None
        return own or train_config(use_rcu=False, **values)

    run(folder, tmp_path / "run", config())
    before = content(tmp_path)
    message = (
        r"\.state: belongs to a run with other settings or other cases \(optimization.batch_size "
        r"is 1 there and 2 asked for, crop_size is \[16, 16, 8\] there and \[16, 16, 16\] asked "
        r"for\); use"
    )
    other = config(batch_size=2)
    other.crop_size = (16, 16, 16)
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "run", other)
    assert content(tmp_path) == before
    for path in folder.glob("case2_*"):
        path.unlink()
    with pytest.raises(InputError, match=r"\(1 case\(s\) \(case2\) are there and not asked for\)"):
        run(folder, tmp_path / "run", config())


def test_a_second_run_into_the_same_folder_is_refused_before_it_writes(folder, tmp_path):
    config = train_config(use_rcu=False, epochs=1)
    engine.train(folder, tmp_path / "run", config)
    before = content(tmp_path)
    with locks.only_run_in(tmp_path / "run"):
        for run, other in ((engine.train, config), (engine.pretrain, pretrain_config())):
            with pytest.raises(InputError, match=r"run: another run writes there \(process \d+"):
                run(folder, tmp_path / "run", other)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK: is 1, and torchrun has not set it"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE: is 2, and torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "STEP_NUM_TASKS: is 4: every task of"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "SLURM_NTASKS: is 4: every task of srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE: is 2: every task of mpirun"),
    ],
)
def test_processes_that_do_not_know_each_other_are_refused(
    folder, tmp_path, monkeypatch, variables, message
):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=message):
        engine.train(folder, tmp_path / "run", train_config(use_rcu=False))
    with pytest.raises(InputError, match=message):
        engine.pretrain(folder, tmp_path / "run", pretrain_config())
    assert not (tmp_path / "run").exists()


def test_the_script_of_a_slurm_job_may_train(monkeypatch):
    """It is task 0 of an allocation for several, and the only one."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    distributed.launch(train_config(device="cpu").optimization)


def test_threads_of_the_logs_end_with_the_training(folder, tmp_path, monkeypatch):
    """Also where it stops with an error."""
    before = threading.active_count()
    config = train_config(use_rcu=False, epochs=2)
    engine.train(folder, tmp_path / "run", config)
    engine.pretrain(folder, tmp_path / "mae", pretrain_config(epochs=1))
    nan_gradient_at(monkeypatch, 3)
    with pytest.raises(InputError):
        engine.train(folder, tmp_path / "stops", config)
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["GRCSF", "MaskedAutoencoder"])
def test_model_files_with_weights_that_are_not_finite_are_refused(tmp_path, kind):
    if kind == "GRCSF":
        path = make_model(tmp_path / "m.safetensors")
    else:
        path = make_autoencoders(tmp_path)[0]
    name = sorted(load_file(path))[1]
    rewrite(path, weights=lambda weights: weights[name].view(-1)[0].fill_(math.nan))
    message = rf"safetensors: has weights that are NaN or infinite \({name}\); train again"
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, kind)


def test_a_module_with_weights_that_are_not_finite_is_not_saved(tmp_path):
    model = GRCSF(channels=(4, 8), patch_size=4, num_heads=2, head_dim=4)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)
    with pytest.raises(InputError, match=r"m.safetensors: .* weights that are NaN or infinite"):
        model.save_pretrained(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()

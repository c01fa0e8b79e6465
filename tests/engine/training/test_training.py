# SPDX-License-Identifier: Apache-2.0
"""What the settings of training do, and what is left of a run that was killed."""

from __future__ import annotations

import errno
import signal
import tempfile

import pytest
import safetensors.torch
import torch
from engine import processes
from engine.conftest import pretrain_config, train_config
from engine.training.test_distributed import ROOT, close, python, same
from monai.losses import DiceFocalLoss
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training import state as states
from grcsf_kernels.engine.training.losses import DiceFocal
from grcsf_kernels.models import GRCSF, MaskedAutoencoder


def weights(folder, output, **changes):
    config = train_config(use_rcu=False, **changes)
    return load_file(engine.train(folder, output, config))


def test_the_loss_adds_up_over_parts():
    """From the parts of three micro-batches, the value and gradients of MONAI's loss of all."""
    torch.manual_seed(0)
    logits = torch.randn(6, 1, 8, 6, 4, requires_grad=True)
    label = (torch.rand(6, 1, 8, 6, 4) < 0.1).float()
    label[:3] = 0
    expected = DiceFocalLoss(sigmoid=True, batch=True)(logits, label)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss = DiceFocal()
    parts = sum(loss.parts(logits[i : i + 2], label[i : i + 2], 1 / 3) for i in (0, 2, 4))
    torch.testing.assert_close(loss.loss(parts), expected)
    torch.testing.assert_close(torch.autograd.grad(loss.loss(parts), logits)[0], gradient)
    # A mean over the micro-batches would be another loss.
    mean = sum(
        DiceFocalLoss(sigmoid=True, batch=True)(logits[i : i + 2], label[i : i + 2]) / 3
        for i in (0, 2, 4)
    )
    assert (mean - expected).abs() > 1e-3


def test_deeper_levels_weigh_half():
    loss = DiceFocal()
    label = torch.zeros(1, 1, 8, 8, 8)
    label[0, 0, 3, 3, 3] = 1  # a single voxel stays at every level
    levels = [torch.randn(1, 1, size, size, size) for size in (8, 4, 2)]
    parts = loss.parts(levels, label, 1.0)
    assert parts[:, 2].tolist() == [1, 1, 1]
    one, two, three = (loss.loss(parts[i : i + 1]) for i in range(3))
    torch.testing.assert_close(loss.loss(parts), (one + two / 2 + three / 4) / 1.75)


def test_micro_batches_learn_what_one_batch_does(folder, tmp_path):
    """Where the loss is over the batch as a whole, and where it is a mean."""
    found = [
        weights(folder, tmp_path / str(k), batch_size=4 // k, accumulate_batches=k)
        for k in (1, 2, 4)
    ]
    assert close(found[0], found[1]) and close(found[0], found[2])
    assert not close(found[0], weights(folder, tmp_path / "other", batch_size=2))
    one, two = (
        [
            load_file(path)
            for path in engine.pretrain(
                folder,
                tmp_path / f"mae{k}",
                pretrain_config(batch_size=4 // k, accumulate_batches=k, epochs=1),
            )
        ]
        for k in (1, 4)
    )
    assert all(close(a, b) for a, b in zip(one, two, strict=True))


def test_workers_need_no_short_folder_for_temporary_files(folder, tmp_path, monkeypatch):
    """A socket there has a name of at most 107 bytes; crops it could not hand over were lost."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert weights(folder, tmp_path / "run", workers=1, steps_per_epoch=2, epochs=1)


def test_workers_make_the_same_crops(folder, tmp_path):
    """The same bits, also where cases are read again for each crop."""
    expected = weights(folder, tmp_path / "zero", batch_size=2)
    assert same(expected, weights(folder, tmp_path / "two", batch_size=2, workers=2))
    assert same(
        expected, weights(folder, tmp_path / "again", batch_size=2, workers=2, cache_gb=0.0)
    )


def test_a_case_that_vanishes_is_named_by_the_worker(folder, tmp_path, monkeypatch):
    train = train_config(use_rcu=False, workers=1, cache_gb=0.0)
    split = engine.train.__globals__["split"]

    def vanish(*args):
        for path in folder.glob("*_image.nii.gz"):
            path.unlink()
        return split(*args)

    monkeypatch.setitem(engine.train.__globals__, "split", vanish)
    with pytest.raises(engine.InputError, match=r"case\d_image.nii.gz"):
        engine.train(folder, tmp_path / "run", train)


def test_the_average_is_what_is_kept(folder, tmp_path):
    """One step from the first weights w0 to w1: decay * w0 + (1 - decay) * w1."""
    one = {"epochs": 1, "steps_per_epoch": 1}
    last = weights(folder, tmp_path / "last", **one)
    average = weights(folder, tmp_path / "average", ema_decay=0.75, **one)
    still = weights(folder, tmp_path / "still", learning_rate=1e-30, weight_decay=0.0, **one)
    for name in last:
        torch.testing.assert_close(average[name], 0.75 * still[name] + 0.25 * last[name])
    assert not same(last, average) and not same(still, average)


@pytest.mark.parametrize("kind", ["GRCSF", "MaskedAutoencoder"])
def test_checkpointing_keeps_less_and_changes_nothing(kind):
    torch.manual_seed(0)
    if kind == "GRCSF":
        model = GRCSF(channels=(4, 8, 8), num_heads=2, head_dim=4, patch_size=4, num_maps=1)
        inputs = (torch.randn(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16))
    else:
        model = MaskedAutoencoder(
            4, embed_dim=24, depth=2, num_heads=2, decoder_dim=24, decoder_heads=2
        )
        hidden = torch.arange(64)[None] % 2 == 0
        inputs = (torch.randn(1, 1, 16, 16, 16), hidden)
    kept, gradients = [], []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            out = model(*inputs)
            loss = (out[0] if isinstance(out, tuple) else out).square().mean()
        # Each storage once, and no weights.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        for weight in model.parameters():
            storages.pop(weight.untyped_storage().data_ptr(), None)
        kept.append(sum(storages.values()))
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert kept[1] < 0.6 * kept[0]
    assert same(*gradients)


def test_deep_supervision_is_for_training_only(folder, tmp_path):
    config = train_config(use_rcu=False)
    config.model.deep_supervision = True
    path = engine.train(folder, tmp_path / "run", config)
    model = load_checkpoint(path, "GRCSF").model
    image = torch.randn(1, 1, 17, 16, 9)
    logits = model(image)
    assert logits.shape == image.shape
    plain = GRCSF(**(model.config | {"deep_supervision": False})).eval()
    # Nothing but the heads is added.
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys == [
        "deep_heads.0.weight",
        "deep_heads.0.bias",
    ]
    assert torch.equal(plain(image), logits)
    levels = model.train()(image)
    assert [tuple(x.shape) for x in levels] == [(1, 1, 17, 16, 9), (1, 1, 9, 8, 5)]
    torch.testing.assert_close(levels[0], logits)
    engine.predict(folder, path, tmp_path / "m", engine.PredictConfig(device="cpu"))


def test_a_compiled_network_has_the_same_names(folder, tmp_path, monkeypatch):
    """Traced by Dynamo and run as it is: what the compiler itself makes takes too long here."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager"))
    plain = weights(folder, tmp_path / "plain", epochs=1, ema_decay=0.5)
    assert close(
        plain, weights(folder, tmp_path / "compiled", epochs=1, ema_decay=0.5, compile=True)
    )


def test_overlays_and_curves(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = train_config(use_rcu=False)
    config.validation_fraction, config.validation_every, config.overlays = 0.67, 1, 1
    engine.train(folder, tmp_path / "run", config)
    events = EventAccumulator(str(tmp_path / "run/logs"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss", "learning rate", "seconds a step", "validation dice"}
    assert [point.step for point in events.Scalars("loss")] == [0, 1]
    assert len(tags["images"]) == 1
    assert len(events.Images(tags["images"][0])) == 2


def test_killed_at_any_point(folder, tmp_path):
    """Killed within an epoch, then while it writes a state; the third run ends with equal bits."""
    script = ROOT / "tests/engine/processes.py"
    whole = engine.train(folder, tmp_path / "whole", processes.interrupted())
    for part, steps in (("killed", 4), ("killed_writing", 4)):
        done = python(script, part, folder, tmp_path / "run")
        assert done.returncode == -signal.SIGKILL, done.stderr
        state = torch.load(tmp_path / "run/model.state", weights_only=True)
        assert state["done"] == steps
    assert len(list((tmp_path / "run").glob(".grcsf-*.tmp"))) == 1
    path = engine.train(folder, tmp_path / "run", processes.interrupted())
    assert same(load_file(whole), load_file(path))
    states = [torch.load(p.with_suffix(".state"), weights_only=True) for p in (whole, path)]
    assert states[0]["best"] == states[1]["best"] and same(*(s["average"] for s in states))
    assert not list((tmp_path / "run").glob(".*"))


def test_what_may_change_between_runs(folder, tmp_path):
    """How often states are written changes no weights; the size of the batch does."""
    config = train_config(use_rcu=False, epochs=1)
    engine.train(folder, tmp_path / "run", config)
    config.optimization.checkpoint_every, config.optimization.cache_gb = 1, 1.0
    engine.train(folder, tmp_path / "run", config)
    config.optimization.accumulate_batches = 2
    with pytest.raises(
        engine.InputError, match=r"optimization.accumulate_batches is 1 there and 2 asked"
    ):
        engine.train(folder, tmp_path / "run", config)


@pytest.mark.parametrize("what", ["state", "safetensors"])
def test_a_full_disk(folder, tmp_path, monkeypatch, what):
    """The message names the file; the former one is whole, and the run goes on from it."""
    config = train_config(use_rcu=False, epochs=2)
    whole = weights(folder, tmp_path / "whole", epochs=2)
    module, name = (states.torch, "save") if what == "state" else (safetensors.torch, "save_file")
    write, calls = getattr(module, name), []

    def full(content, path, **options):
        calls.append(path)
        write(content, path, **options)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(engine.InputError, match=rf"model.{what}: can't be written \(.*No space"):
        engine.train(folder, tmp_path / "run", config)
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*"))
    assert torch.load(tmp_path / "run/model.state", weights_only=True)["done"] == 2
    load_checkpoint(tmp_path / "run/model.safetensors", "GRCSF")
    assert same(whole, load_file(engine.train(folder, tmp_path / "run", config)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate_batches": 0}, "accumulate_batches: is 0; expected above 0"),
        ({"ema_decay": 1.0}, "ema_decay: is 1.0; expected below 1"),
        ({"workers": -1}, "workers: is -1; expected 0 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every: is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range(folder, tmp_path, change, message):
    with pytest.raises(engine.InputError, match=message):
        engine.train(folder, tmp_path / "run", train_config(use_rcu=False, **change))


def test_a_model_file_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"weight": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(engine.InputError, match=r"model.safetensors: is no model file"):
        load_checkpoint(tmp_path / "model.safetensors", "GRCSF")
    assert not (tmp_path / "exploded").exists()

# SPDX-License-Identifier: Apache-2.0
"""Several processes learn what one does, and none waits for one that is gone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import processes
from engine.conftest import blob, cases, write
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.engine.model_files import load_checkpoint

ROOT = Path(__file__).parents[3]


def python(*command):
    """A process of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """One call of torchrun for all tests: two processes do ``processes.parallel``."""
    folder = tmp_path_factory.mktemp("launched")
    cases(folder / "data")
    cases(folder / "bad")
    write(folder / "bad/case1_image.nii.gz", blob(1)[0] * np.nan)
    engine.save_config(processes.segmentation(epochs=1), folder / "train.yaml")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests/engine/processes.py"
    return folder, python(*torchrun, script, "parallel", folder / "data", folder)


@pytest.fixture
def found(launched):
    """What the two processes saw, and the folder."""
    folder, done = launched
    files = [folder / f"found{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    return *(json.loads(file.read_text()) for file in files), folder


def close(one, two):
    """Equal to the rounding of a few steps of Adam."""
    for weights in (one, two):
        for name in weights:
            if name.endswith("qkv.bias"):
                # The bias of the keys cancels in the softmax: its gradient is rounding alone, and
                # Adam makes whole steps of it.
                weights[name].view(3, -1)[1] = 0
    return all(torch.allclose(one[name], two[name], rtol=1e-4, atol=2e-6) for name in one)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_as_one_does(found, tmp_path):
    """Equal losses and weights, to rounding, as one process with twice the batch."""
    first, second, folder = found
    one = processes.record(
        lambda: engine.train(folder / "data", tmp_path, processes.segmentation(batch_size=2))
    )
    weights = load_file(tmp_path / "model.safetensors")
    for kind in ("train", "sharded"):
        assert first[kind] == second[kind] and len(first[kind]) == 6
        np.testing.assert_allclose(first[kind], one, rtol=2e-5)
        assert close(weights, load_file(folder / kind / "model.safetensors"))


def test_two_processes_pretrain_as_one_does(found, tmp_path):
    """Stopped and gone on from a state, whole weights or weights in parts."""
    first, second, folder = found
    one = processes.record(
        lambda: engine.pretrain(folder / "data", tmp_path, processes.autoencoder(batch_size=2))
    )
    weights = load_file(tmp_path / "mae_75.safetensors")
    for kind in ("ddp", "fsdp"):
        assert first[kind] == second[kind]
        np.testing.assert_allclose(first[kind], one[4:], rtol=2e-5)
        assert close(weights, load_file(folder / kind / "mae_75.safetensors"))
        load_checkpoint(folder / kind / "mae_75.safetensors", "MaskedAutoencoder")
    np.testing.assert_allclose(first["half"], one, rtol=2e-2)
    assert first["half"] != one


def test_two_processes_go_on_to_the_same_bits(found):
    first, _, folder = found
    assert first["again"] == first["train"][4:]
    assert same(*(load_file(folder / k / "model.safetensors") for k in ("train", "part")))


def test_all_processes_stop_at_a_bad_loss(found):
    """With one message, which names the crops of both."""
    first, second, _ = found
    assert first["wild"] == second["wild"]
    assert re.search(r"step \d+: the loss is (nan|inf) on case\d, case\d;", first["wild"])


def test_the_command_under_torchrun(launched, found):
    """One report of a bad file, one line with what was written."""
    folder, done = launched
    assert done.stdout.count(str(folder / "command/model.safetensors")) == 1
    assert done.stderr.count("bad/case1_image.nii.gz: has") == 1
    assert done.stderr.count("1 input(s) skipped") == 1
    first, second, _ = found
    assert first["status"] == 1 and second["status"] == 0
    load_checkpoint(folder / "command/model.safetensors", "GRCSF")


def test_a_process_that_dies_ends_the_others(launched, found):
    """torchrun names it, the other one does not hang, and a state is left to go on from."""
    folder, done = launched
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    # torchrun may have ended the other one before it could say something.
    if (folder / "alone.txt").exists():
        assert "process 0: lost the other processes" in (folder / "alone.txt").read_text()
    state = torch.load(folder / "dead/model.state", weights_only=True)
    assert state["done"] == 2


def test_settings_that_do_not_fit():
    for change, message in (
        ({"strategy": "horovod"}, "strategy: is 'horovod'; expected auto, ddp or fsdp"),
        ({"timeout_minutes": 0.0}, "timeout_minutes: is 0.0; expected above 0"),
    ):
        with pytest.raises(engine.InputError, match=message):
            engine.train(Path("nowhere"), Path("nowhere"), processes.segmentation(**change))

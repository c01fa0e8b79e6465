# SPDX-License-Identifier: Apache-2.0
"""Preprocessed cases on disk: the same tensors, made again when a file or a setting changes."""

from __future__ import annotations

import os

import pytest
import torch
from engine.conftest import blob, train_config, write
from safetensors.torch import load_file

from grcsf_kernels import engine
from grcsf_kernels.common.settings import to_dict
from grcsf_kernels.engine import DataConfig
from grcsf_kernels.engine.data.cache import CachedCases
from grcsf_kernels.engine.data.samples import Preprocessing, load_sample
from grcsf_kernels.engine.io.datasets import Case


@pytest.fixture
def case(tmp_path):
    image, label = blob(0)
    return Case(
        "a",
        write(tmp_path / "a_image.nii.gz", image),
        write(tmp_path / "a_label.nii.gz", label),
    )


class Counted:
    """A cache in a folder, and how many times it had to read a case."""

    def __init__(self, folder, config=None):
        self.config = DataConfig() if config is None else config
        self.reads = 0
        self.cached = CachedCases(self.load, folder, to_dict(self.config))

    def load(self, case):
        self.reads += 1
        return load_sample(case, Preprocessing(self.config), labels=True)


def entry(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def test_an_entry_is_what_was_read(case, tmp_path):
    counted = Counted(tmp_path / "cache")
    made = load_sample(case, Preprocessing(DataConfig()), labels=True)
    for again in (counted.cached(case), counted.cached(case)):
        assert torch.equal(torch.as_tensor(again.image), torch.as_tensor(made.image))
        assert torch.equal(again.label, made.label) and again.residual is None
        assert torch.equal(torch.as_tensor(again.image.affine), torch.as_tensor(made.image.affine))
    assert counted.reads == 1
    with pytest.raises(ValueError, match="does not say how it was made"):
        Preprocessing(DataConfig()).restore(again.label, again.image)


def test_a_file_or_setting_that_changes_is_read_again(case, tmp_path):
    folder = tmp_path / "cache"
    Counted(folder).cached(case)
    other = Counted(folder, DataConfig(spacing=(2.0, 2.0, 2.0)))
    assert other.cached(case).image.shape != Counted(folder).cached(case).image.shape
    assert other.reads == 1
    label = blob(0)[1]
    label[0, 0, 0] = 1
    write(case.label, label)
    os.utime(case.label, ns=(1, 1))
    changed = Counted(folder)
    assert changed.cached(case).label.sum() == label.sum() and changed.reads == 1


@pytest.mark.parametrize("fault", ["truncated", "empty", "flipped", "not ours"])
def test_a_damaged_entry_is_made_again(case, tmp_path, fault):
    folder = tmp_path / "cache"
    image = torch.as_tensor(Counted(folder).cached(case).image)
    path = entry(folder)
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[-100] ^= 1
    cut = {"truncated": len(content) // 2, "empty": 0, "flipped": len(content), "not ours": 0}
    path.unlink()  # a mapped file must not shrink under its reader
    path.write_bytes(b"text" if fault == "not ours" else content[: cut[fault]])
    again = Counted(folder)
    assert torch.equal(torch.as_tensor(again.cached(case).image), image) and again.reads == 1
    last = Counted(folder)
    last.cached(case)
    assert last.reads == 0 and len(list(folder.iterdir())) == 1


def test_a_cache_that_can_not_be_written_costs_no_case(case, tmp_path, capsys):
    """A full disk, or here a file where its folder is meant."""
    (tmp_path / "cache").write_text("a file")
    counted = Counted(tmp_path / "cache")
    made = [counted.cached(case), counted.cached(case)]
    assert made[0].label.any() and counted.reads == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("can't be written") == 1 and "read again" in said


def test_training_from_the_cache_gives_the_same_bits(folder, tmp_path):
    weights = []
    for name, cache in (("plain", None), ("first", "cache"), ("second", "cache")):
        config = train_config(use_rcu=False, epochs=1, cache_gb=0.0)
        config.optimization.cache_dir = cache and str(tmp_path / cache)
        weights.append(load_file(engine.train(folder, tmp_path / name, config)))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)

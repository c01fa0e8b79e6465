# SPDX-License-Identifier: Apache-2.0
"""Splits: the same for the same seed, sessions of a subject together, nnU-Net's file as it is."""

from __future__ import annotations

import json

import pytest
import torch
from engine.conftest import train_config

from grcsf_kernels import engine
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.data.splits import save_split, split
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.seeding import seed_of


def cases(*names):
    return [Case(name, name) for name in names]


PLAIN = cases(*(f"case{index:02d}" for index in range(20)))
SESSIONS = cases(*(f"sub-{s:02d}_ses-{n}" for s in range(10) for n in (1, 2, 3)))


def config(**changes):
    settings = train_config()
    settings.validation_fraction = 0.25
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def test_a_share_follows_from_the_seed():
    """The same order as ever: a shuffle of the cases, of which the first validate."""
    training, validation = split(PLAIN, config())
    generator = torch.Generator().manual_seed(seed_of(0, 1))
    order = torch.randperm(20, generator=generator).tolist()
    assert (validation, training) == (order[:5], order[5:])
    other = config()
    other.optimization.seed = 1
    assert split(PLAIN, other) != (training, validation)


@pytest.mark.parametrize("changes", [{}, {"folds": 4, "fold": 1}])
def test_sessions_of_a_subject_stay_together(changes):
    training, validation = split(SESSIONS, config(**changes))
    sides = [{SESSIONS[index].subject for index in part} for part in (training, validation)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert sorted(training + validation) == list(range(30)) and validation


def test_each_case_validates_in_one_fold():
    held = [split(PLAIN, config(folds=3, fold=fold))[1] for fold in range(3)]
    assert sorted(index for part in held for index in part) == list(range(20))
    assert {len(part) for part in held} == {6, 7}
    with pytest.raises(InputError, match=r"folds: is 30; expected at most the 20 subjects"):
        split(PLAIN, config(folds=30))
    with pytest.raises(InputError, match=r"^fold: is 3"):
        check(config(folds=3, fold=3))
    with pytest.raises(InputError, match=r"^folds: is 1"):
        check(config(folds=1))
    with pytest.raises(InputError, match=r"^fold: is 1; set folds or splits_file"):
        check(config(fold=1))


def test_no_validation_case_is_said(capsys):
    training, validation = split(PLAIN[:3], config())
    assert len(training) == 3 and not validation
    assert "no validation case" in capsys.readouterr().err
    split(PLAIN[:3], config(validation_fraction=0.0))
    assert not capsys.readouterr().err  # asked for


def test_splits_of_nnunet(tmp_path, capsys):
    path = tmp_path / "splits_final.json"
    first = {"train": ["case00", "case01", "gone"], "val": ["case02"]}
    second = {"train": ["case03"], "val": ["case00", "case01"]}
    path.write_text(json.dumps([first, second]))
    settings = config(splits_file=str(path))
    assert split(PLAIN, settings) == ([0, 1], [2])
    said = capsys.readouterr().err
    assert "1 case(s) listed in" in said and "gone" in said and "17 case(s) are not in" in said
    assert split(PLAIN, config(splits_file=str(path), fold=1)) == ([3], [0, 1])
    with pytest.raises(InputError, match="fold: is 2; expected below the 2 splits"):
        split(PLAIN, config(splits_file=str(path), fold=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}x", "is no file of splits"),
        ('{"train": []}', "is no file of splits"),
        ('[{"train": ["case00"]}]', "is no file of splits"),
        ('[{"train": ["case00"], "val": ["case00"]}]', "has case00 in train and in val"),
        ('[{"train": ["other"], "val": ["case00"]}]', "no usable case to train on"),
        ("[]", "is no file of splits"),
        ('"train"', "is no file of splits"),
        ("[1, 2]", "is no file of splits: split 0 has no list of names in train"),
        ('[{"train": "case00", "val": []}]', "no list of names in train"),
        ('[{"train": ["case00"], "val": [["case01"]]}]', "no list of names in val"),
        ('[{"train": ["case00", "case00"], "val": []}]', "has case00 2 times in train"),
        ("[" * 100_000, "is no file of splits: .* no JSON"),
        ('[{"train": ["case00"], "val": []}', "is no file of splits: .* no JSON"),
    ],
)
def test_a_wrong_file_of_splits(tmp_path, text, message):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        split(PLAIN, config(splits_file=str(path)))
    with pytest.raises(InputError, match="is no file of splits"):
        split(PLAIN, config(splits_file=str(tmp_path / "none.json")))


def test_a_file_of_splits_with_a_mark_of_byte_order_is_read(tmp_path):
    path = tmp_path / "splits.json"
    path.write_bytes(b'\xef\xbb\xbf[{"train": ["case00"], "val": ["case01"]}]')
    assert split(PLAIN, config(splits_file=str(path))) == ([0], [1])
    path.write_bytes('[{"train": ["Ünal"], "val": []}]'.encode("latin-1"))
    with pytest.raises(InputError, match=r"splits.json: .*is no text in UTF-8.*save it as UTF-8"):
        split(PLAIN, config(splits_file=str(path)))


def test_a_validation_of_cases_that_are_not_there_is_said(tmp_path, capsys):
    path = tmp_path / "splits.json"
    path.write_text('[{"train": ["case00"], "val": ["gone"]}]')
    assert split(PLAIN, config(splits_file=str(path))) == ([0], [])
    assert "no case of val is there" in capsys.readouterr().err


def test_a_subject_on_both_sides_of_a_file_is_said(tmp_path, capsys):
    path = tmp_path / "splits.json"
    path.write_text('[{"train": ["sub-00_ses-1"], "val": ["sub-00_ses-2"]}]')
    split(SESSIONS, config(splits_file=str(path)))
    assert "1 subject(s) are in train and in val: sub-00" in capsys.readouterr().err


def test_a_run_writes_a_split_that_can_be_used_again(folder, tmp_path):
    settings = train_config(use_rcu=False, epochs=1, steps_per_epoch=1)
    settings.validation_fraction = 0.34
    engine.train(folder, tmp_path / "run", settings)
    path = tmp_path / "run/split.json"
    (written,) = json.loads(path.read_text())
    assert len(written["train"]) == 2 and len(written["val"]) == 1
    names = cases("case0", "case1", "case2")
    again = split(names, config(splits_file=str(path)))
    save_split(tmp_path / "again.json", names, again)
    assert json.loads((tmp_path / "again.json").read_text()) == [written]

# SPDX-License-Identifier: Apache-2.0
"""Settings: what is refused, wherever it comes from, and what is read as it is meant."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import numpy as np
import pytest

from grcsf_kernels import engine
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import check, expected, from_dict, to_dict
from grcsf_kernels.engine import config as configs
from grcsf_kernels.engine.config import PRESETS, dump_config, preset
from grcsf_kernels.engine.settings_yaml import descriptions
from grcsf_kernels.engine.training.pace import Pace

CLASSES = [
    getattr(configs, name)
    for name in configs.__all__
    if dataclasses.is_dataclass(getattr(configs, name))
]
FIELDS = [
    (cls, entry.name)
    for cls in CLASSES
    for entry in dataclasses.fields(cls)
    if not entry.name.startswith("_") and not dataclasses.is_dataclass(getattr(cls(), entry.name))
]


def is_numeric(hint):
    """Whether numbers other than the few that are named can stand in a setting."""
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(is_numeric(part) for part in typing.get_args(hint))


NUMERIC = [
    (cls, name)
    for cls, name in FIELDS
    if is_numeric(typing.get_type_hints(cls, include_extras=True)[name])
]


def with_number(default, number):
    """The default with ``number`` in place of (each of) its numbers."""
    if isinstance(default, tuple):
        return tuple(with_number(item, number) for item in default or (0.0,))
    return number


def spelled(text, tmp_path, cls=engine.TrainConfig):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return engine.load_config(cls, path)


def test_there_are_settings_to_test():
    assert len(CLASSES) == 10 and len(FIELDS) >= 100 and len(NUMERIC) >= 70


@pytest.mark.parametrize(("cls", "name"), NUMERIC, ids=lambda x: getattr(x, "__name__", x))
def test_no_number_is_taken_that_is_none(cls, name):
    """NaN, infinity, far too small or large, bool and text: in Python and in YAML."""
    # A list that may be empty or null: one value, or pairs of them.
    shapes = {"spacing": (1.0,) * 3, "channel_windows": ((0.0, 1.0),)}
    default = getattr(cls(), name)
    default = shapes.get(name, (1,)) if default in (None, ()) else default
    for number in (math.nan, math.inf, -math.inf, -1e9, 10**400, True, "1"):
        value = with_number(default, number)
        config = cls()
        setattr(config, name, value)
        with pytest.raises(InputError, match=rf"^{name}: is .*; expected"):
            check(config)
        with pytest.raises(InputError, match=rf"^x.yaml: {name}: is .*; expected"):
            from_dict(cls, {name: value}, "x.yaml")


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_setting_is_described_and_refuses_another_type(cls, name):
    assert len(descriptions(cls)[name]) > 8 and descriptions(cls)[name].endswith(".")
    assert expected(cls, name)
    for wrong in ({"a": 1}, [["x"]], ""):
        with pytest.raises(InputError, match=f"^x.yaml: {name}: is"):
            from_dict(cls, {name: wrong}, "x.yaml")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_is_written_is_read_back_the_same(cls, tmp_path):
    for comments in (False, True):
        assert spelled(dump_config(cls(), comments=comments), tmp_path, cls) == cls()


def test_odd_texts_survive_yaml(tmp_path):
    for text in ("1e-4", "null", "a: b", "[x]", "  y ", "ü\u2028#", "~", "0x10"):
        config = engine.TrainConfig(splits_file=text)
        config.data.channel_windows = ((0.0, 1e-5), (1.0, 2.0))
        for comments in (False, True):
            assert spelled(dump_config(config, comments=comments), tmp_path) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("+1.e-4", 1e-4), (".5", 0.5), ("1", 1.0), ("0.25", 0.25)],
)
def test_numbers_in_yaml_are_numbers(text, value, tmp_path):
    config = spelled(f"optimization: {{learning_rate: {text}}}", tmp_path)
    assert config.optimization.learning_rate == value
    assert type(config.optimization.learning_rate) is float


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("0x10", 16), ("0o10", 8), ("+7", 7)])
def test_whole_numbers_in_yaml_are_what_they_look_like(text, value, tmp_path):
    assert spelled(f"optimization: {{seed: {text}}}", tmp_path).optimization.seed == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimization: {seed: 18446744073709551616}",
            "optimization.seed: is 18446744073709551616",
        ),
        ("optimization: {seed: -1}", r"optimization.seed: is -1; expected from 0 to 4294967295"),
        ("optimization: {epochs: 1:30}", "optimization.epochs: is '1:30'; expected int"),
        ("optimization: {epochs: " + "9" * 5000 + "}", "can't be read"),
        ("optimization: {epochs: 0x" + "f" * 5000 + "}", "is a number with too many digits"),
        ("optimization: {epochs: 2.0}", "optimization.epochs: is 2.0; expected int"),
        ("optimization: {learning_rate: .inf}", "learning_rate: is inf; expected a finite number"),
        ("optimization: {learning_rate: .nan}", "learning_rate: is nan; expected a finite number"),
        ("foreground: 'a\\nb'", "foreground: is"),
        ("epoch: 3", "unknown setting 'epoch'; .*the nearest is optimization.epochs"),
        ("model: {chanels: [4]}", "model: unknown setting 'chanels'; .*the nearest is channels"),
        ("1: 2", "unknown setting 1; expected one of data"),
        ("? [a]\n: 2", "unhashable|unknown setting"),
        ("crop_size: [8, 8, 8]\ncrop_size: [4, 4, 4]", "line 2: the key 'crop_size' comes twice"),
        ("model: {depth: &a [1, *a]}", "alias"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", r"line 2: an alias \(\*\) stands for a value"),
        ("data:\n\tspacing: null", "with spaces in place of tabs"),
        ("[" * 3_000, "is nested too deep"),
        ("- 1", "holds \\[1\\]; expected a mapping"),
        ("data: 3", "data: holds 3; expected a mapping"),
        ("data: null", "data: holds None; expected a mapping"),
        ("just words", "holds 'just words'; expected a mapping"),
        ("a: 1\n---\nb: 2", "can't be read"),
        ("!!python/object/apply:os.system ['true']", "can't be read"),
        ("a: 2024-01-01", "unknown setting 'a'"),
        ("#" * 200_000, "is larger than 100000 bytes"),
        (b"# \xe4\n", "save it as text in UTF-8"),
        (b"a: \x00", "save it as text in UTF-8"),
        ("mirror_axes: [0, 0]", "mirror_axes: is .*; expected values that differ"),
        ("mirror_axes: [true]", "mirror_axes: is .*; expected 0, 1 or 2"),
        ('splits_file: "a\\0b"', "splits_file: is"),
        ("lesion_labels: []", "lesion_labels: is .*; expected at least one value"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        spelled(text, tmp_path)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "settings.yaml")) and len(line) < 800
    assert "\n" not in line and line.isprintable()


def test_a_file_with_a_mark_of_its_encoding_is_read(tmp_path):
    text = "optimization: {epochs: 3}  # ä"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert spelled(text.encode(encoding), tmp_path).optimization.epochs == 3
    assert spelled("", tmp_path) == spelled("# nothing\n", tmp_path) == engine.TrainConfig()


def test_a_folder_or_nothing_in_place_of_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="can't be read"):
            engine.load_config(engine.TrainConfig, path)


def test_what_means_the_same_becomes_the_same():
    config = engine.TrainConfig(
        crop_size=[np.int64(8), 8, 8], foreground=1, splits_file=Path("a/b.json")
    )
    config.data.spacing = [1, np.float32(2), 3.0]
    check(config)
    assert config.crop_size == (8, 8, 8) and type(config.crop_size[0]) is int
    assert type(config.foreground) is float and config.splits_file == "a/b.json"
    assert config.data.spacing == (1.0, 2.0, 3.0)
    assert from_dict(engine.TrainConfig, to_dict(config), "x") == config


def test_another_class_in_place_of_a_part():
    with pytest.raises(InputError, match=r"^data: is .*; expected DataConfig"):
        check(engine.TrainConfig(data=None))


@pytest.mark.parametrize("command", sorted(PRESETS["small"]))
def test_a_preset_differs_from_the_defaults_and_builds_a_network(command):
    settings = preset("small", command)
    check(settings)
    assert settings != type(settings)()
    assert PRESETS["small"][command]["crop_size"] == settings.crop_size
    if command == "train":
        network = engine.train.__globals__["build"](settings, 2, 1)
    else:
        network = engine.pretrain.__globals__["build"](settings, 0.5)
    assert sum(weight.numel() for weight in network.parameters()) < 1_000_000
    with pytest.raises(InputError, match="--preset: predict has no preset 'small'"):
        preset("small", "predict")


def test_a_training_of_hours_is_said_after_three_steps():
    pace = Pace("GRCSF", 20_000)
    lines = [pace.step(now) for now in (100.0, 118.0, 136.0, 154.0, 172.0)]
    assert [line is not None for line in lines] == [False, False, True, False, False]
    assert "about 100 hours, at 18.0 s a step" in lines[2] and "--preset small" in lines[2]
    fast = Pace("GRCSF", 20_000)
    assert not any(fast.step(now) for now in (0.0, 0.3, 0.6, 0.9))

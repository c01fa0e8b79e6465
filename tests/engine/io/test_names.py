# SPDX-License-Identifier: Apache-2.0
"""Text and names of any bytes: lists, descriptions, file names, what is said of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from engine.conftest import (
    blob,
    load,
    make_autoencoders,
    predict_config,
    residuals_config,
    train_config,
    write,
)

from grcsf_kernels import engine
from grcsf_kernels.common.errors import printable
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.io.sources import read_json, read_list, read_text

# Latin-1, an escape that clears a terminal, the end of a line, markup, the longest name.
NAMES = {
    "not UTF-8": os.fsdecode(b"Z\xfcrich"),
    "escape": "a\x1b[2Jb",
    "two lines": "a\nb",
    "markup": "[bold]a[red]",
    "long": "x" * 225,
    "other scripts": "脳梗塞",
    "turned around": "a\u202eb",
}


def test_names_of_any_characters_are_read_and_written(tmp_path, model):
    data, out = tmp_path / "data", tmp_path / "out"
    image, label = blob(0)
    for name in NAMES.values():
        write(data / f"images/{name}.nii.gz", image)
        write(data / f"labels/{name}.nii.gz", label)
    report = engine.predict(data, model, out, predict_config())
    assert {path.name for path in report.done} == {f"{n}_mask.nii.gz" for n in NAMES.values()}
    assert not report.failed and load(report.done[0]).shape == (21, 18, 13)
    result = engine.evaluate(out, data, config=engine.EvaluateConfig(cases=2))
    assert set(result["cases"]) == set(NAMES.values())
    assert "\x1b" not in (out / "evaluation.html").read_text(encoding="utf-8")


def test_what_is_said_of_a_name_is_one_line_that_can_be_shown(tmp_path, model, capfd):
    folder = tmp_path / "data"
    write(folder / "sound.nii.gz", blob(0)[0])
    for name in NAMES.values():
        (folder / f"{name}.nii.gz").write_text("nothing")
    report = engine.predict(folder, model, tmp_path / "out", predict_config())
    assert len(report.done) == 1 and len(report.failed) == len(NAMES)
    for _, line in report.failed:
        assert line.isprintable() and "no NIfTI" in line and line == printable(line)
        assert line.encode("utf-8")
    said = capfd.readouterr().err
    assert "[bold]a[red].nii.gz" in said and "Traceback" not in said


def test_training_and_maps_take_names_of_any_characters(tmp_path):
    for name in (NAMES["not UTF-8"], NAMES["two lines"], NAMES["markup"]):
        write(tmp_path / f"data/{name}_image.nii.gz", blob(0)[0])
        write(tmp_path / f"data/{name}_label.nii.gz", blob(0)[1])
    maps = tmp_path / "maps"
    autoencoders = make_autoencoders(tmp_path)
    report = engine.cache_residuals(tmp_path / "data", autoencoders, maps, residuals_config())
    assert len(report.done) == 3 and not report.failed
    report = engine.Report()
    config = train_config(epochs=1)
    engine.train(tmp_path / "data", tmp_path / "run", config, maps, report)
    assert not report.failed


class TestLists:
    def test_a_mark_of_byte_order_and_windows_lines(self, folder, tmp_path):
        path = tmp_path / "list.txt"
        path.write_bytes(b"\xef\xbb\xbfdata/a.nii.gz\r\n\r\n  /b.nii.gz \r\n")
        assert read_list(path) == [tmp_path / "data/a.nii.gz", Path("/b.nii.gz")]

    def test_names_that_are_not_utf8(self, tmp_path):
        path = tmp_path / "list.txt"
        path.write_bytes(b"Z\xfcrich.nii.gz\n")
        assert read_list(path) == [tmp_path / os.fsdecode(b"Z\xfcrich.nii.gz")]

    @pytest.mark.parametrize("content", ["a.nii.gz".encode("utf-16"), b"\0\0"])
    def test_what_is_no_text_is_refused(self, tmp_path, model, content):
        path = tmp_path / "list.txt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"list.txt: is no text in UTF-8; .*save it as UTF-8"):
            engine.predict(path, model, tmp_path / "out", predict_config())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe{\x00}\x00", "is no text in UTF-8"),
        (b'{"labels": "\xfc"}', "is no text in UTF-8"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b"9" * 10_000, "is no JSON"),
        (b"", "is empty"),
        (b"[1, 2]", "have to be mappings"),
        (b'"text"', "have to be mappings"),
        (b'{"channel_names": {"0": "T1"}, "labels": [1]}', "have to be mappings"),
        (b'{"channel_names": {"0": "T1"}, "labels": {"l": {"a": 1}}}', "has the labels"),
        (b'{"channel_names": {"0": 1}, "labels": {"l": 1}, "file_ending": [1]}', "file_ending"),
    ],
)
def test_a_description_of_any_content_is_one_line(tmp_path, content, problem):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        find_cases(tmp_path, engine.Report(), labels=True)
    line = str(error.value)
    assert problem in line and line.startswith(f"{tmp_path / 'dataset.json'}: ")
    assert line.isprintable()


def test_a_description_with_a_mark_of_byte_order_is_read(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr/a_0000.nii.gz").touch()
    values = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(values), encoding="utf-8-sig")
    assert len(find_cases(tmp_path, engine.Report(), labels=False)) == 1


def test_text_of_any_size_takes_bounded_memory(tmp_path):
    path = tmp_path / "list.txt"
    with open(path, "wb") as file:
        file.truncate(1 << 33)
    for read in (read_text, read_list, lambda path: read_json(path, "JSON")):
        with pytest.raises(InputError, match=r"list.txt: has more than \d+ bytes"):
            read(path)


def test_logs_and_cache_take_names_of_any_characters(tmp_path):
    names = (NAMES["not UTF-8"], NAMES["two lines"], "$x_$^")
    for name in names:
        write(tmp_path / f"data/{name}_image.nii.gz", blob(0)[0])
        write(tmp_path / f"data/{name}_label.nii.gz", blob(0)[1])
    config = train_config(use_rcu=False, epochs=1, cache_dir=str(tmp_path / "cache"))
    config.validation_fraction, config.overlays = 0.7, 2
    report = engine.Report()
    engine.train(tmp_path / "data", tmp_path / "run", config, report=report)
    assert not report.failed and len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    (split,) = json.loads((tmp_path / "run/split.json").read_text())
    assert sorted(split["train"] + split["val"]) == sorted(names)


def test_a_name_that_is_too_long_for_an_output_is_of_that_case(tmp_path, model, capfd):
    """Its mask has a name that the system takes, its probabilities have not."""
    folder, name = tmp_path / "data", "x" * 240
    for case in ("sound", name):
        write(folder / f"{case}.nii.gz", blob(0)[0])
    settings = predict_config(probabilities=True)
    report = engine.predict(folder, model, tmp_path / "out", settings)
    assert [path.name for path in report.done] == ["sound_mask.nii.gz"]
    (failure,) = report.failed
    assert "File name too long" in failure[1] and failure[1].isprintable() and ";" in failure[1]
    assert {path.name for path in (tmp_path / "out").glob("*")} == {
        "sound_mask.nii.gz",
        "sound_probability.nii.gz",
    }
    assert "Traceback" not in capfd.readouterr().err


def test_a_name_that_is_too_long_for_maps_stops_no_training(folder, tmp_path):
    autoencoders = make_autoencoders(tmp_path)
    for kind, array in zip(("image", "label"), blob(0), strict=True):
        write(folder / f"{'x' * 240}_{kind}.nii.gz", array)
    maps, config = tmp_path / "maps", train_config(epochs=1)
    report = engine.cache_residuals(folder, autoencoders, maps, residuals_config())
    assert len(report.done) == 3 and "File name too long" in report.failed[0][1]
    report = engine.Report()
    engine.train(folder, tmp_path / "run", config, maps, report)
    (failure,) = report.failed
    assert "x_residual.nii.gz: " in failure[1] and failure[1].isprintable()

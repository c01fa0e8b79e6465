# SPDX-License-Identifier: Apache-2.0
"""evaluation.html: a page that is whole, holds every case, needs no network and trusts no name."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from engine.conftest import AFFINE, blob, write

pytest.importorskip("matplotlib", reason="needs the extra train")

from PIL import Image

from grcsf_kernels import engine
from grcsf_kernels.engine.evaluation import figures
from grcsf_kernels.engine.evaluation.bootstrap import interval, sensitivity_by_size, summarize

HOSTILE = "<img src=x onerror=alert(1)>&\"'"
EMPTY = {"img", "meta", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes, tables and text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.table = self.rows.setdefault(dict(attributes)["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "tr" in self.open and self.open[-1] != "tr":
            self.table[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(source):
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB"))


def page(folder):
    return Page((folder / "evaluation.html").read_text(encoding="utf-8"))


@pytest.fixture
def masks(folder, tmp_path):
    """case0 is right, case1 shifted, case2 empty, and a fourth has a name that is code."""
    image, label = blob(3)
    name = HOSTILE.replace("/", "")
    write(folder / f"{name}_image.nii.gz", image)
    write(folder / f"{name}_label.nii.gz", label)
    changes = {
        "case0": lambda mask: mask,
        "case1": lambda mask: np.roll(mask, 2, axis=0),
        "case2": np.zeros_like,
        name: lambda mask: np.roll(mask, 1, axis=1),
    }
    for case, change in changes.items():
        mask = np.asarray(nib.load(folder / f"{case}_label.nii.gz").dataobj)
        write(tmp_path / f"masks/{case}_mask.nii.gz", change(mask))
    return tmp_path / "masks"


def test_page_holds_every_case_and_nothing_from_elsewhere(folder, masks):
    result = engine.evaluate(masks, folder)
    found = page(masks)
    assert [row[0] for row in found.rows["cases"][1:]] == list(result["cases"])
    shown = {row[0]: row for row in found.rows["cases"][1:]}
    assert shown["case1"][1] == f"{result['cases']['case1']['dice']:.3f}"
    assert shown["case2"][5] == "undefined" and "undefined" not in shown["case0"]
    # Names are text and nothing else.
    assert shown[HOSTILE] and not [tag for tag in found.all("img") if "onerror" in tag]
    # No file, no network: pictures are in the page, and there is no other reference.
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"href", "srcset", "data", "action"} & attributes.keys()
        if tag != "img":
            assert "src" not in attributes
    raw = re.sub(r"data:image/png;base64,[\w+/=]+", "", (masks / "evaluation.html").read_text())
    assert "//" not in raw.replace("// what is undefined", "") and "url(" not in raw
    pictures = [picture(tag["src"]) for tag in found.all("img")]
    assert len(pictures) == 1 + 4
    assert all(min(array.shape[:2]) > 150 and array.std() > 5 for array in pictures)
    heads = re.findall(r"<h3>(.*?): Dice", (masks / "evaluation.html").read_text())
    assert heads[0] == "case2" and heads[-1] == "case0"  # the worst first


def test_summary_is_that_of_the_cases(folder, masks):
    result = engine.evaluate(masks, folder)
    values = [row["dice"] for row in result["cases"].values()]
    summary = result["summary"]["dice"]
    assert summary["mean"] == result["mean"]["dice"] == pytest.approx(np.mean(values))
    assert summary["median"] == pytest.approx(np.median(values))
    low, high = summary["mean_interval"]
    assert min(values) <= low < summary["mean"] < high <= max(values)
    assert result["summary"]["hd95"]["count"] == 3
    row = page(masks).rows["summary"][1]
    assert row[0] == "Dice" and row[1] == f"{summary['mean']:.3f}" and row[-1] == "4"
    volume = np.prod(nib.affines.voxel_sizes(AFFINE))
    label = np.asarray(nib.load(folder / "case1_label.nii.gz").dataobj)
    (size, found), *others = result["lesions"]["case1"]
    assert size == pytest.approx(label.sum() * volume) and found is True and not others
    assert result["lesions"]["case2"][0][1] is False


def test_only_as_many_slices_as_asked_for(folder, masks):
    engine.evaluate(masks, folder, config=engine.EvaluateConfig(cases=1))
    assert len(page(masks).all("img")) == 2
    engine.evaluate(masks, folder, config=engine.EvaluateConfig(cases=0))
    assert len(page(masks).all("img")) == 1 and "Slices" not in page(masks).text
    with pytest.raises(engine.InputError, match="cases: is -1"):
        engine.evaluate(masks, folder, config=engine.EvaluateConfig(cases=-1))


def test_labels_alone_and_what_was_skipped(folder, masks, tmp_path):
    for path in folder.glob("*_image.nii.gz"):
        path.unlink()
    (masks / "case0_mask.nii.gz").unlink()
    engine.evaluate(masks, folder, tmp_path / "out")
    found = page(tmp_path / "out")
    assert "masks are painted" in found.text and "1 skipped" in found.text
    assert "case0_mask.nii.gz: does not exist" in found.text
    assert picture(found.all("img")[1]["src"]).std() > 5


def test_every_measure_undefined_or_one_case(folder, masks, tmp_path):
    """Both masks of the only case are empty: no distance anywhere, no interval."""
    empty = np.zeros((21, 18, 13), np.uint8)
    write(tmp_path / "one/a_label.nii.gz", empty)
    write(tmp_path / "m/a_mask.nii.gz", empty)
    result = engine.evaluate(tmp_path / "m", tmp_path / "one")
    rows = page(tmp_path / "m").rows
    assert rows["summary"][1][1:3] == ["1.000", "too few cases"]
    assert rows["summary"][5][1:] == ["undefined", "too few cases"] * 2 + ["0"]
    assert rows["sizes"][1] == ["below 100", "0", "0", "no lesion", ""]
    assert result["lesions"] == {"a": []}


def test_radiological_whatever_the_order_of_the_file():
    """A lesion on the patient's left and in front is at the right and the top of the picture."""
    truth = np.zeros((24, 20, 9), bool)
    truth[3:6, 14:17, 2:4] = True  # RAS+: left is where x is low, front where y is high
    image = np.random.default_rng(0).uniform(50, 100, truth.shape).astype(np.float32)
    pictures = []
    for codes in ("RAS", "LPS", "SAL"):
        ras, target = (nib.orientations.axcodes2ornt(order) for order in ("RAS", codes))
        change = nib.orientations.ornt_transform(ras, target)
        volumes = [nib.apply_orientation(v, change) for v in (image, truth)]
        affine = nib.orientations.inv_ornt_aff(change, truth.shape)
        png = figures.draw_slices(volumes[0], volumes[1], np.zeros_like(volumes[1]), affine)
        pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int))
    for array in pictures:
        # The label's color, #00c8ff.
        rows, columns = np.nonzero((np.abs(array - (0, 200, 255)) < 30).all(-1))
        assert rows.mean() < array.shape[0] * 0.45 and columns.mean() > array.shape[1] * 0.6
    # The picture is the same; only the slice's number in the title is the file's own.
    body = [array[70:] for array in pictures]
    assert all(np.array_equal(body[0], other) for other in body[1:])


def test_telling_slices():
    truth, prediction = np.zeros((2, 6, 6, 5), bool)
    assert figures.telling_slices(truth, prediction) == [(2, ["no lesion"])]
    truth[1:3, 1:3, 1:4] = True
    assert figures.telling_slices(truth, prediction) == [(1, ["largest error"])]
    prediction[1:3, 1:3, 3] = True
    prediction[:, :, 4] = True
    assert figures.telling_slices(truth, prediction) == [
        (4, ["largest error"]),
        (3, ["best agreement"]),
    ]
    assert figures.telling_slices(truth, truth) == [(1, ["best agreement"])]


def test_intervals_and_sizes():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = interval(np.mean, values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert interval(np.mean, values) == (low, high)  # the same on every call
    assert interval(np.mean, [1.0]) is None
    assert summarize([{"a": None}, {"a": 3.0}])["a"] == {
        "count": 1,
        "mean": 3.0,
        "mean_interval": None,
        "median": 3.0,
        "median_interval": None,
    }
    cases = [[(99.9, False), (100.0, True)], [(5.0, True), (1e4, True)], []]
    small, medium, large = sensitivity_by_size(cases)
    assert (small["lesions"], small["found"], small["sensitivity"]) == (2, 1, 0.5)
    assert small["interval"] == [0.0, 1.0]
    assert (medium["lesions"], medium["found"], medium["interval"]) == (1, 1, None)
    assert (large["from"], large["to"], large["found"]) == (1000.0, None, 1)

# SPDX-License-Identifier: Apache-2.0
"""The picture: written whole, the right slice, and masks painted where they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra train")

from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.image import imread  # noqa: E402

from grcsf_kernels.engine.evaluation import figures  # noqa: E402

TITLES = ("first map", "second map")


def _case(**changes: object) -> figures.FigureCase:
    grid = np.indices((24, 20, 9)) - np.array([12, 10, 4])[:, None, None, None]
    truth = (grid**2).sum(0) < 9
    fields: dict = {
        "name": "ball",
        "image": ((grid**2).sum(0) < 70) * (100.0 - np.arange(24)[:, None, None]),
        "residuals": np.stack([truth, ~truth]).astype(np.float32),
        "truth": truth,
        "prediction": np.roll(truth, 2, axis=0),
    }
    return figures.FigureCase(**fields | changes)


def _share(picture: np.ndarray, color: str) -> float:
    """Share of the pixels whose hue is near the color (painted at 60 % over gray)."""
    painted = np.array(to_rgb(color)) * 0.6
    rest = picture[..., :3] - painted
    gray = np.ptp(rest, axis=-1) < 0.03
    return float((gray & (rest.min(-1) > -0.03) & (rest.max(-1) < 0.43)).mean())


def test_largest_slice() -> None:
    mask = np.zeros((4, 5, 6), np.uint8)
    assert figures.largest_slice(mask) == 3  # empty: the middle
    mask[1, 1, 1] = 1
    mask[1:3, 1:3, 4] = 1
    assert figures.largest_slice(mask) == 4


def test_png_is_written_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    figures.save_figure(path, [_case(), _case(name="again")], title="t", residual_titles=TITLES)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    picture = imread(path)
    assert picture.shape[1] > 1000
    assert picture.shape[0] > 500
    assert picture.std() > 0.1


def test_masks_are_painted_and_same_case_gives_same_file(tmp_path: Path) -> None:
    one, two, none = (tmp_path / name for name in ("one.png", "two.png", "none.png"))
    for path in (one, two):
        figures.save_figure(path, [_case()], title="t", residual_titles=TITLES)
    assert one.read_bytes() == two.read_bytes()
    empty = np.zeros((24, 20, 9))
    figures.save_figure(none, [_case(prediction=empty)], title="t", residual_titles=TITLES)
    with_prediction, without = imread(one), imread(none)
    assert _share(with_prediction, figures.TRUTH) > 0.001
    assert _share(with_prediction, figures.PREDICTION) > 0.001
    assert _share(without, figures.PREDICTION) < 0.0002


def test_masks_may_be_empty_or_full_and_images_flat(tmp_path: Path) -> None:
    full = np.ones((24, 20, 9))
    cases = [_case(truth=full * 0, prediction=full * 0), _case(truth=full, image=full)]
    figures.save_figure(tmp_path / "p.png", cases, title="t", residual_titles=TITLES)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truth of ball"):
        _case(truth=np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="residuals of ball"):
        _case(residuals=np.zeros((2, 3, 3, 3)))
    with pytest.raises(ValueError, match="image of ball"):
        _case(image=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="2 residual maps, expected 1"):
        figures.save_figure(tmp_path / "p.png", [_case()], title="t", residual_titles=("one",))
    with pytest.raises(ValueError, match="at least one case"):
        figures.save_figure(tmp_path / "p.png", [], title="t")
    assert not list(tmp_path.iterdir())


def test_the_backend_of_a_notebook_breaks_no_command():
    """A shell of Jupyter or Colab has MPLBACKEND of a package that is not in every environment."""
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    command = [sys.executable, "-m", "grcsf_kernels.cli", "config", "evaluate"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "cases: 20" in run.stdout


def test_pictures_do_not_depend_on_the_backend_of_the_session(monkeypatch):
    """Nor do they change it: figures are drawn without pyplot."""
    truth = np.zeros((8, 9, 4), bool)
    truth[2:5, 3:6, 1:3] = True
    image = np.random.default_rng(0).random(truth.shape, np.float32)
    first = figures.draw_slices(image, truth, truth, np.eye(4))
    monkeypatch.setitem(matplotlib.rcParams, "backend", "template")
    assert figures.draw_slices(image, truth, truth, np.eye(4)) == first
    assert figures.box_plots({"Dice": [0.1, 0.5]}).startswith(b"\x89PNG")
    assert matplotlib.rcParams["backend"] == "template"

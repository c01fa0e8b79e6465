# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.study.illustration``: real lesions, each by what learnt only the others.

Two or three cases of different organs and scanners: no result, only a look at real images. Every
case is segmented by a GRCSF, maps included, that was trained on crops of the other cases alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from benchmarks.harness import results
from benchmarks.study import runs
from benchmarks.study.pool import exit_status, run_all, use_one_thread_each
from benchmarks.study.scales import SCALES
from grcsf_kernels import engine
from grcsf_kernels.engine.evaluation.figures import FigureCase, save_figure
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.report import Report

_ROOT = Path(__file__).resolve().parents[2]
_DATA = engine.DataConfig(spacing=(1.5, 1.5, 4.0))
_MARGIN_MM = 25.0  # around the lesion, of what the picture shows


def _optimization(steps: int, batch: int, rate: float) -> engine.OptimizationConfig:
    return engine.OptimizationConfig(
        epochs=2,
        steps_per_epoch=steps // 2,
        batch_size=batch,
        learning_rate=rate,
        warmup_epochs=0.2,
    )


PRETRAINING = engine.PretrainConfig(
    data=_DATA,
    model=dataclasses.replace(SCALES["cpu"].autoencoder, patch_size=(8, 8, 4)),
    optimization=_optimization(400, 1, 1e-3),
    crop_size=(48, 48, 16),
)
TRAINING = engine.TrainConfig(
    data=_DATA,
    model=engine.ModelConfig(
        channels=(8, 16, 32), rcu_levels=(0,), patch_size=(4, 4, 2), reduction=4
    ),
    optimization=_optimization(400, 2, 3e-3),
    crop_size=(32, 32, 12),
    validation_fraction=0.0,
)


def segment(data: Path, name: str, work: Path) -> None:
    """Train on all cases but ``name``, segment it and measure the mask."""
    folder = work / name
    done = folder / "evaluation.json"
    if done.is_file():
        return
    for case in find_cases(data, Report(), labels=True):
        target = folder / ("own" if case.name == name else "others")
        target.mkdir(parents=True, exist_ok=True)
        assert case.label is not None
        for path in (case.image, case.label):
            shutil.copy(path, target)
    own, others = folder / "own", folder / "others"
    autoencoders = engine.pretrain(others, folder / "autoencoders", PRETRAINING)
    maps = {}
    for source in (own, others):
        maps[source] = folder / "maps" / source.name
        settings = engine.ResidualsConfig()
        runs.expect_all(engine.cache_residuals(source, autoencoders, maps[source], settings))
    model = engine.train(others, folder / "model", TRAINING, maps[others])
    masks = folder / "masks"
    settings = engine.PredictConfig()
    runs.expect_all(engine.predict(own, model, masks, settings, residuals=maps[own]))
    engine.evaluate(masks, own, folder)


def _row(folder: Path, name: str) -> FigureCase:
    """The surroundings of the lesion, and no more of the head: it is not defaced."""

    def read(path: Path) -> Any:
        return nib.as_closest_canonical(nib.load(path))  # type: ignore[attr-defined]

    (image_path,) = (folder / "own").glob("*_image.nii.gz")
    image = read(image_path)
    truth = np.asarray(read(folder / "own" / f"{name}_label.nii.gz").dataobj) > 0
    mask = np.asarray(read(folder / "masks" / f"{name}_mask.nii.gz").dataobj) > 0
    maps = np.asarray(read(folder / "maps" / "own" / f"{name}_residual.nii.gz").dataobj)
    x, y, z = (float(size) for size in image.header.get_zooms()[:3])
    box = []
    for part, size in zip(ndimage.find_objects(truth.astype(np.uint8))[0], (x, y, z), strict=True):
        margin = round(_MARGIN_MM / size)
        box.append(slice(max(part.start - margin, 0), part.stop + margin))
    place = tuple(box)
    measured = json.loads((folder / "evaluation.json").read_text())["cases"][name]
    return FigureCase(
        name,
        np.asarray(image.dataobj, np.float32)[place],
        np.moveaxis(maps[place], -1, 0),
        truth[place],
        mask[place],
        (x, y, z),
        (f"Dice {measured['dice']:.2f}",),
    )


def main(arguments: list[str] | None = None) -> int:
    """Segment every case and draw them; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.illustration", description=__doc__
    )
    parser.add_argument("--data", type=Path, help="folder of cases; default: tests/data")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "study-cpu")
    parser.add_argument("--work", type=Path, default=Path("build/study/illustration"))
    parser.add_argument("--jobs", type=int, help="processes at once")
    options = parser.parse_args(arguments)
    data = (options.data or _ROOT / "tests" / "data").resolve()
    names = [case.name for case in find_cases(data, Report(), labels=True)]
    work = options.work.resolve()
    jobs = [(segment, (data, name, work)) for name in names]
    failed = run_all(jobs, use_one_thread_each(options.jobs))
    if not failed:
        save_figure(
            options.out / "illustration.png",
            [_row(work / name, name) for name in names],
            title="Illustration, no result: each by a network that saw only the other cases",
        )
    return exit_status(failed)


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""The pieces of a study, each in a process of its own, each with a result that is kept.

Every function here is called in a fresh process by :mod:`benchmarks.study.__main__` and leaves
files that appear whole; one that finds its files does nothing. A training that was killed goes on
from its last state.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import results
from benchmarks.study import protocol, ranking
from benchmarks.study.difficulty import measure_difficulty
from benchmarks.study.protocol import ARMS, Scale
from grcsf_kernels import engine
from grcsf_kernels.engine.checkpoint import load_checkpoint
from grcsf_kernels.engine.data import Preprocessing, find_cases, load_sample, residual_path
from grcsf_kernels.engine.files import write_whole
from grcsf_kernels.engine.pretrain import autoencoder_path
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.synthetic import make_dataset

SETS = ("training", "held_out")


@dataclass(frozen=True)
class Study:
    """Where a study is.

    Attributes:
        scale: its scale.
        work: folder for subjects, maps, models and masks.
        out: folder for what is committed.
    """

    scale: Scale
    work: Path
    out: Path

    def run_path(self, arm: str, seed: int) -> Path:
        """The result of an arm with a seed."""
        return self.out / "runs" / f"{arm}-{seed}.json"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Model and masks of an arm with a seed."""
        return self.work / "runs" / f"{arm}-{seed}"

    def maps(self, seed: int, masking: str, subjects: str) -> Path:
        """The residual maps of a set of subjects."""
        return self.work / "maps" / f"{masking}-{seed}" / subjects


def save(path: Path, content: Any) -> None:
    """Write JSON, whole."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def machine() -> dict[str, Any]:
    """Where and with what a result was made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": results.device_name(device), "versions": results.versions()}


def make_subjects(study: Study, subjects: str) -> None:
    """Make the subjects of a set."""
    folder, scale = study.work / subjects, study.scale
    count = getattr(scale, subjects)
    done = folder / "done.json"
    seed = {"training": protocol.TRAINING, "held_out": protocol.HELD_OUT}[subjects]
    wanted = [count, seed, scale.spacing, list(protocol.LESIONS)]
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return
    make_dataset(folder, count, seed, scale.spacing, protocol.LESIONS)
    save(done, wanted)


def rate_difficulty(study: Study) -> None:
    """How well a threshold and plain models of the intensities do on the held-out subjects."""
    path = study.out / "difficulty.json"
    if not path.is_file():
        save(path, measure_difficulty(study.work / "training", study.work / "held_out"))


def make_maps(study: Study, seed: int) -> None:
    """Pretrain the autoencoders of a seed and make its residual maps, random and complementary."""
    folder = study.work / "autoencoders" / str(seed)
    config = protocol.pretraining(study.scale, seed)
    start = time.perf_counter()
    paths = [autoencoder_path(folder, ratio) for ratio in config.model.mask_ratios]
    if not all(path.is_file() for path in paths) or any(
        path.with_suffix(".state").is_file() for path in paths
    ):
        paths = engine.pretrain(study.work / "training", folder, config)
    for masking in ("random", "complementary"):
        settings = protocol.residuals(masking, seed)
        for subjects in SETS:
            target = study.maps(seed, masking, subjects)
            done = engine.cache_residuals(study.work / subjects, paths, target, settings)
            _expect_all(done)
    seconds = time.perf_counter() - start
    save(study.out / "ranking" / f"{seed}.json", _rank(study, seed) | {"seconds": seconds})


def _rank(study: Study, seed: int) -> dict[str, Any]:
    """ROC AUC of every map and of plain scores, by held-out subject."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    voxel = study.scale.spacing**3
    preprocessing = Preprocessing(engine.DataConfig())
    for case in find_cases(study.work / "held_out", Report(), labels=True):
        sample = load_sample(case, preprocessing, labels=True)
        assert sample.label is not None
        image, label = sample.image[0].numpy(), sample.label[0].numpy() > 0
        inside = image != 0  # air stays 0
        scores = dict(ranking.reference_scores(image))
        for masking in ("random", "complementary"):
            file: Any = nib.load(residual_path(study.maps(seed, masking, "held_out"), case))
            for index, ratio in enumerate(study.scale.autoencoder.mask_ratios):
                scores[f"{ratio:.0%} hidden, {masking}"] = np.asarray(file.dataobj)[..., index]
        for name, score in scores.items():
            areas = ranking.areas_under_curve(score, label, inside, voxel)
            found.setdefault(name, {})[case.name] = areas
    return {"areas": found, "machine": machine()}


def run_arm(study: Study, arm: str, seed: int) -> None:
    """Train an arm with a seed, segment the held-out subjects and measure the masks."""
    path, folder = study.run_path(arm, seed), study.run_folder(arm, seed)
    scale, chosen = study.scale, ARMS[arm]
    identity = protocol.identity(scale, chosen, seed)
    if is_current(path, identity):
        return
    maps = None if chosen.masking is None else study.maps(seed, chosen.masking, "training")
    start = time.perf_counter()
    model = engine.train(
        study.work / "training", folder, protocol.training(scale, chosen, seed), maps
    )
    trained = time.perf_counter()
    masks = folder / "masks"
    maps = None if chosen.masking is None else study.maps(seed, chosen.masking, "held_out")
    settings = protocol.prediction(scale)
    _expect_all(engine.predict(study.work / "held_out", model, masks, settings, residuals=maps))
    predicted = time.perf_counter()
    measured = engine.evaluate(masks, study.work / "held_out", folder)
    network = load_checkpoint(model, "GRCSF").model
    save(
        path,
        {
            "arm": arm,
            "seed": seed,
            "identity": identity,
            "cases": measured["cases"],
            "lesions": measured["lesions"],
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "training_seconds": trained - start,
            "prediction_seconds": (predicted - trained) / scale.held_out,
            "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "machine": machine(),
        },
    )


def is_current(path: Path, identity: dict[str, Any]) -> bool:
    """Whether a result is there and was made with these settings."""
    return path.is_file() and json.loads(path.read_text())["identity"] == identity


def _expect_all(report: engine.Report) -> None:
    if report.failed:
        path, reason = report.failed[0]
        raise engine.InputError(path, reason, "the study made this file: please report it")


def call(function: Callable[..., None], *arguments: Any) -> None:
    """In a fresh process: with the bars of the engine off, and the result's name at the end."""
    from grcsf_kernels.engine.report import console

    console.quiet = True
    start = time.perf_counter()
    function(*arguments)
    text = " ".join(str(argument) for argument in arguments[1:])
    taken = time.perf_counter() - start
    sys.stdout.write(f"{function.__name__.replace('_', ' ')} {text}: {taken:.0f} s\n")
    sys.stdout.flush()

# SPDX-License-Identifier: Apache-2.0
"""The pieces of a study, each in a process of its own, each with a result that is kept.

Every function here is called in a fresh process by :mod:`benchmarks.study.pool` and leaves
files that appear whole; one that finds its files does nothing. A training that was killed goes on
from its last state.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.study import protocol, ranking
from benchmarks.study.difficulty import measure_difficulty
from benchmarks.study.protocol import ARMS, Scale
from grcsf_kernels import engine
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.demo.synthetic import make_dataset
from grcsf_kernels.engine.data.samples import Preprocessing, load_sample
from grcsf_kernels.engine.io.datasets import find_cases
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.report import Report

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
    """Make the subjects of a set, see :func:`benchmarks.study.protocol.subject_sets`."""
    folder = study.work / subjects
    count, seed, lesions = protocol.subject_sets(study.scale)[subjects]
    done = folder / "done.json"
    wanted = [count, seed, study.scale.spacing, list(lesions)]
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return
    make_dataset(folder, count, seed, study.scale.spacing, lesions)
    save(done, wanted)


def rate_difficulty(study: Study) -> None:
    """How well a threshold and plain models of the intensities do on the held-out subjects."""
    path = study.out / "difficulty.json"
    if not path.is_file():
        save(path, measure_difficulty(study.work / "training", study.work / "held_out"))


def make_maps(study: Study, seed: int) -> None:
    """Pretrain the autoencoders of a seed and make its residual maps, random and complementary."""
    path = study.out / "ranking" / f"{seed}.json"
    identity = protocol.maps_identity(study.scale, seed)
    start = time.perf_counter()
    folder = study.work / "autoencoders" / str(seed)
    config = protocol.pretraining(study.scale, seed)
    paths = engine.pretrain(study.work / "training", folder, config)
    held_out = {}
    for masking in protocol.MASKINGS:
        settings = protocol.residuals(masking, seed)
        for subjects in SETS:
            target = study.maps(seed, masking, subjects)
            expect_all(engine.cache_residuals(study.work / subjects, paths, target, settings))
        held_out[masking] = study.maps(seed, masking, "held_out")
    seconds = time.perf_counter() - start
    if is_current(path, identity):
        return
    areas = rank_maps(study.work / "held_out", held_out, study.scale)
    save(path, {"identity": identity, "areas": areas, "seconds": seconds, "machine": machine()})


def rank_maps(data: Path, maps: dict[str, Path], scale: Scale) -> dict[str, Any]:
    """ROC AUC of every map and of plain scores, by subject.

    Args:
        data: the subjects.
        maps: folders of residual maps, by the name of what is special about them.
        scale: of the study; gives mask ratios and spacing.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    preprocessing = Preprocessing(protocol.DATA)
    for case in find_cases(data, Report(), labels=True):
        sample = load_sample(case, preprocessing, labels=True)
        assert sample.label is not None
        image, label = sample.image[0].numpy(), sample.label[0].numpy() > 0
        scores = dict(ranking.reference_scores(image))
        for name, folder in maps.items():
            residual = load_sample(case, preprocessing, residuals=folder).residual
            assert residual is not None
            for index, ratio in enumerate(scale.autoencoder.mask_ratios):
                scores[f"{ratio:.0%} hidden, {name}"] = residual[index].numpy()
        for name, score in scores.items():
            # Air stays 0 when an image is normalized.
            areas = ranking.areas_under_curve(score, label, image != 0, scale.spacing**3)
            found.setdefault(name, {})[case.name] = areas
    return found


def run_arm(study: Study, arm: str, seed: int) -> None:
    """Train an arm with a seed, segment the held-out subjects and measure the masks."""
    path, folder = study.run_path(arm, seed), study.run_folder(arm, seed)
    chosen = ARMS[arm]
    identity = protocol.identity(study.scale, chosen, seed)
    if is_current(path, identity):
        return
    maps = [
        None if chosen.masking is None else study.maps(seed, chosen.masking, subjects)
        for subjects in SETS
    ]
    data = [study.work / subjects for subjects in SETS]
    config = protocol.training(study.scale, chosen, seed)
    measured = train_and_measure(data, maps, config, folder, study.scale)
    save(path, {"arm": arm, "seed": seed, "identity": identity, **measured})


def train_and_measure(
    data: Sequence[Path],
    maps: Sequence[Path | None],
    config: engine.TrainConfig,
    folder: Path,
    scale: Scale,
) -> dict[str, Any]:
    """Train on the first folder of ``data``, segment the second one and measure the masks.

    Args:
        data: subjects to train on and to measure.
        maps: their residual maps.
        config: of the training.
        folder: gets model and masks.
        scale: of the study; gives the settings of prediction.
    """
    start = time.perf_counter()
    model = engine.train(data[0], folder, config, maps[0])
    trained = time.perf_counter()
    masks, settings = folder / "masks", protocol.prediction(scale)
    expect_all(engine.predict(data[1], model, masks, settings, residuals=maps[1]))
    predicted = time.perf_counter()
    measured = engine.evaluate(masks, data[1], folder)
    network = load_checkpoint(model, "GRCSF").model
    return {
        "cases": measured["cases"],
        "lesions": measured["lesions"],
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "training_seconds": trained - start,
        "prediction_seconds": (predicted - trained) / len(measured["cases"]),
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "machine": machine(),
    }


def is_current(path: Path, identity: dict[str, Any]) -> bool:
    """Whether a result is there and was made with these settings."""
    return path.is_file() and json.loads(path.read_text())["identity"] == identity


def expect_all(report: engine.Report) -> None:
    if report.failed:
        path, reason = report.failed[0]
        raise engine.InputError(path, reason, "the study made this file: please report it")

# SPDX-License-Identifier: Apache-2.0
"""The whole of GRCSF in a few minutes on two CPU cores, on a real head with synthetic lesions.

Subjects are made (:mod:`grcsf_kernels.demo.synthetic`), masked autoencoders pretrained, residual
maps cached, a small GRCSF and its plain backbone trained under one budget, held-out subjects
segmented by both and by a GRCSF that was never trained, all of it measured and one picture drawn.
Every step is the engine's own function, with the settings below.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grcsf_kernels import engine
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.demo.speedup import measure_savings
from grcsf_kernels.demo.synthetic import make_dataset
from grcsf_kernels.dispatch import OPERATORS, select
from grcsf_kernels.engine.evaluation.figures import FigureCase, save_figure
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.report import console as progress_console
from grcsf_kernels.engine.seeding import seed_of
from grcsf_kernels.engine.training.train import build
from grcsf_kernels.models.files import save_checkpoint

NETWORKS = {
    "grcsf": "GRCSF",
    "backbone": "the plain backbone",
    "untrained": "an untrained GRCSF",
}
CAVEAT = (
    "The lesions are synthetic: random dark blobs drawn into a deformed T1 template. The numbers "
    "are of {count} held-out synthetic subjects after {steps} training steps; they show that the "
    "parts work together, not how GRCSF does on patients, and differences of a few hundredths "
    "between the two trained networks are chance."
)
_MARK = ".grcsf_demo"  # in folders that a demo may clear


@dataclass
class Budget:
    """How much the demo does; the defaults take about four minutes on two CPU cores."""

    healthy: int = 8  # subjects for pretraining
    training: int = 16  # subjects with lesions
    held_out: int = 4
    pretraining_steps: int = 80  # for each of the two autoencoders
    training_steps: int = 200  # for each of the two networks


@dataclass
class Stage:
    """What a stage cost.

    Attributes:
        name: what was done.
        seconds: by the clock.
        cpu_seconds: of all threads of the process.
        peak_mib: highest resident memory of the whole process during the stage.
        gpu_mib: highest memory of tensors on the GPU; None without one.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    gpu_mib: float | None = None


def run_demo(
    output: Path, *, spacing: float = 2.0, seed: int = 0, budget: Budget | None = None
) -> dict[str, Any]:
    """Run everything and print the result.

    Args:
        output: a new or empty folder, or that of an earlier demo, which is replaced. Gets the
            subjects, residual maps, predictions (NIfTI), models, ``demo.png`` and ``demo.json``.
        spacing: voxel size in mm.
        seed: of everything random.
        budget: how much to do.

    Returns:
        What ``demo.json`` holds: ``networks`` (evaluation and number of parameters of each),
        ``stages``, ``backends``, ``saved``, ``budget``, ``spacing``, ``seed`` and ``caveat``.

    Raises:
        InputError: ``output`` holds something else.
    """
    budget = Budget() if budget is None else budget
    output = Path(output)
    _clear(output)
    out = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        # A fall-back to the reference is said in the next line, and better.
        warnings.simplefilter("ignore", RuntimeWarning)
        served = {operator: select(operator, device) for operator in OPERATORS}
    out.print(
        f"GRCSF demo on [bold]{device}[/bold], {torch.get_num_threads()} threads; operators run on "
        + ", ".join(f"{operator}: [bold]{backend}[/bold]" for operator, backend in served.items()),
        soft_wrap=True,
    )
    stages: list[Stage] = []

    with _stage(stages, "make synthetic subjects"):
        _make_subjects(output, budget, spacing, seed)
    training, held_out = output / "training", output / "held_out"
    pretraining, segmentation = _settings(training, budget, seed)

    with _stage(stages, "pretrain two autoencoders"):
        autoencoders = engine.pretrain(output / "healthy", output / "autoencoders", pretraining)
    with _stage(stages, "cache residual maps"):
        maps = {folder: output / "residuals" / folder.name for folder in (training, held_out)}
        for folder, target in maps.items():
            settings = engine.ResidualsConfig(overlap=0.25, seed=seed)
            _all_done(engine.cache_residuals(folder, autoencoders, target, settings))

    plain = replace(segmentation, model=replace(segmentation.model, use_gcu=False, use_rcu=False))
    models = {}
    with _stage(stages, "train GRCSF"):
        models["grcsf"] = engine.train(training, output / "grcsf", segmentation, maps[training])
    with _stage(stages, "train the plain backbone"):
        models["backbone"] = engine.train(training, output / "backbone", plain)
    models["untrained"] = _untrained(output / "untrained", segmentation)

    networks: dict[str, Any] = {}
    for name, model in models.items():
        with _stage(stages, f"segment with {NETWORKS[name]}"):
            masks = output / "predictions" / name
            prediction = engine.PredictConfig(overlap=0.25)
            _all_done(engine.predict(held_out, model, masks, prediction, residuals=maps[held_out]))
            networks[name] = engine.evaluate(masks, held_out)
        weights = load_checkpoint(model, "GRCSF").model.parameters()
        networks[name]["parameters"] = sum(weight.numel() for weight in weights)

    with _stage(stages, "measure what the kernels save"):
        batch = segmentation.optimization.batch_size
        network = load_checkpoint(models["grcsf"], "GRCSF").model.to(device)
        saved = measure_savings(network, (batch, 1, *segmentation.crop_size), maps=2)

    caveat = CAVEAT.format(count=budget.held_out, steps=budget.training_steps)
    result = {
        "networks": networks,
        "stages": [asdict(stage) for stage in stages],
        "backends": served,
        "saved": saved,
        "budget": asdict(budget),
        "spacing": spacing,
        "seed": seed,
        "caveat": caveat,
    }
    _draw(output, held_out, networks["grcsf"]["cases"], caveat)
    text = json.dumps(result, indent=1)
    write_whole(output / "demo.json", lambda temporary: temporary.write_text(text))
    for table in (_result_table(networks), _stage_table(stages)):
        out.print(table)
    size = "x".join(map(str, segmentation.crop_size))
    out.print(
        f"What the kernels save: a training step of GRCSF ({batch} crops of {size} voxels) takes "
        f"{saved['seconds']:.2f} s; with the reference in plain PyTorch it takes "
        f"{saved['reference_seconds']:.2f} s, {saved['times']:.1f} times as long.",
        soft_wrap=True,
    )
    out.print(caveat, style="bold")
    out.print(f"Picture: {output / 'demo.png'}; volumes, models and numbers are beside it.")
    return result


def _clear(output: Path) -> None:
    """An empty folder with our mark in it; what an earlier demo left is removed."""
    if output.exists() and not output.is_dir():
        raise engine.InputError(output, "is a file", "name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / _MARK).is_file():
            raise engine.InputError(
                output, "is not empty and not of an earlier demo", "name a new folder"
            )
        # A run that was started here before would be resumed, and its times would mean nothing.
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).touch()


def _make_subjects(output: Path, budget: Budget, spacing: float, seed: int) -> None:
    sets = {
        "healthy": (budget.healthy, (0, 0)),
        "training": (budget.training, (2, 5)),
        "held_out": (budget.held_out, (2, 5)),
    }
    with Progress(console=progress_console) as progress:
        bar = progress.add_task("subjects", total=sum(count for count, _ in sets.values()))
        for index, (name, (count, lesions)) in enumerate(sets.items()):
            make_dataset(
                output / name,
                count,
                seed_of(seed, index),
                spacing,
                lesions,
                progress=lambda done, total: progress.advance(bar),
            )


def _settings(
    training: Path, budget: Budget, seed: int
) -> tuple[engine.PretrainConfig, engine.TrainConfig]:
    """Settings for the size of the subjects: networks small enough for two cores."""
    image: Any = nib.load(sorted(training.glob("*_image.nii.gz"))[0])

    def crop(most: int) -> tuple[int, int, int]:
        x, y, z = (min(most, -(-size // 8) * 8) for size in image.shape)
        return x, y, z

    def optimization(steps: int, batch: int, rate: float) -> engine.OptimizationConfig:
        epochs = min(4, steps)
        return engine.OptimizationConfig(
            epochs=epochs,
            steps_per_epoch=steps // epochs,
            batch_size=batch,
            learning_rate=rate,
            warmup_epochs=0.5,
            seed=seed,
        )

    pretraining = engine.PretrainConfig(
        model=engine.AutoencoderConfig(
            patch_size=(8, 8, 8),
            embed_dim=96,
            depth=3,
            num_heads=4,
            decoder_dim=96,
            decoder_depth=2,
            decoder_heads=4,
        ),
        optimization=optimization(budget.pretraining_steps, 2, 1e-3),
        crop_size=crop(64),
    )
    segmentation = engine.TrainConfig(
        model=engine.ModelConfig(
            channels=(8, 16, 32, 64), rcu_levels=(0,), patch_size=(4, 4, 4), reduction=4
        ),
        optimization=optimization(budget.training_steps, 4, 1e-2),
        crop_size=crop(32),
        validation_fraction=0.0,
    )
    return pretraining, segmentation


def _untrained(output: Path, config: engine.TrainConfig) -> Path:
    """GRCSF as training starts with it: the same seed, no step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.optimization.seed)
        model = build(config, num_maps=2)
    return save_checkpoint(output / "model.safetensors", model, config.data, config.crop_size)


def _all_done(report: engine.Report) -> None:
    if report.failed:
        path, reason = report.failed[0]
        raise engine.InputError(path, reason, "the demo made this file: please report it")


@contextmanager
def _stage(stages: list[Stage], name: str) -> Iterator[None]:
    """Append what the block cost to ``stages``."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with _ResidentPeak() as memory:
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    peak_gpu = torch.cuda.max_memory_allocated() / 2**20 if gpu else None
    stages.append(Stage(name, clock, cpu, memory.peak / 2**20, peak_gpu))


class _ResidentPeak:
    """Highest resident memory in bytes while the block runs, looked at every 20 ms.

    The system's own peak (``ru_maxrss``) never goes down, so it can't tell stages apart; it is
    used only where there is no ``/proc``.
    """

    def __enter__(self) -> _ResidentPeak:
        self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        import resource

        try:
            pages = Path("/proc/self/statm").read_text().split()[1]
        except OSError:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return int(pages) * resource.getpagesize()


def _draw(output: Path, held_out: Path, measures: dict[str, Any], caveat: str) -> None:
    """``demo.png``: the three held-out subjects with the largest lesions."""

    def read(path: Path) -> Any:
        image: Any = nib.load(path)
        return np.asarray(image.dataobj), image

    rows = []
    for name, measured in measures.items():
        image, file = read(held_out / f"{name}_image.nii.gz")
        maps, _ = read(output / "residuals" / held_out.name / f"{name}_residual.nii.gz")
        truth, _ = read(held_out / f"{name}_label.nii.gz")
        prediction, _ = read(output / "predictions" / "grcsf" / f"{name}_mask.nii.gz")
        x, y, z = (float(zoom) for zoom in file.header.get_zooms()[:3])
        scores = (f"Dice {measured['dice']:.2f}", f"lesion F1 {measured['lesion_f1']:.2f}")
        rows.append(
            FigureCase(name, image, np.moveaxis(maps, -1, 0), truth, prediction, (x, y, z), scores)
        )
    rows.sort(key=lambda row: -int(row.truth.sum()))
    first, second, rest = caveat.partition("; ")
    save_figure(
        output / "demo.png",
        rows[:3],
        title="GRCSF on held-out subjects with synthetic lesions",
        footnote=f"{first}{second}\n{rest}",
    )


def _result_table(networks: dict[str, Any]) -> Table:
    table = Table("network", title="Held-out subjects with synthetic lesions, mean")
    for heading in ("Dice", "lesion F1", "sensitivity", "precision", "parameters"):
        table.add_column(heading, justify="right")
    for name, result in networks.items():
        mean = result["mean"]
        values = (mean[key] for key in ("dice", "lesion_f1", "sensitivity", "precision"))
        numbers = ("-" if value is None else f"{value:.3f}" for value in values)
        table.add_row(NETWORKS[name], *numbers, f"{result['parameters']:,}")
    return table


def _stage_table(stages: list[Stage]) -> Table:
    table = Table("stage", title="What each stage took")
    gpu = stages[0].gpu_mib is not None
    headings = ["seconds", "CPU seconds", "peak memory, MiB"] + ["GPU, MiB"] * gpu
    for heading in headings:
        table.add_column(heading, justify="right")
    total = Stage(
        "total",
        sum(stage.seconds for stage in stages),
        sum(stage.cpu_seconds for stage in stages),
        max(stage.peak_mib for stage in stages),
        max(stage.gpu_mib or 0 for stage in stages) if gpu else None,
    )
    for stage in (*stages, total):
        if stage is total:
            table.add_section()
        numbers = [f"{stage.seconds:.1f}", f"{stage.cpu_seconds:.1f}", f"{stage.peak_mib:,.0f}"]
        table.add_row(stage.name, *numbers, *([f"{stage.gpu_mib:,.0f}"] if gpu else []))
    return table

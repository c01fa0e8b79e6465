# SPDX-License-Identifier: Apache-2.0
"""The commands of ``grcsf``: options in, one function of the engine each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from grcsf_kernels import engine
from grcsf_kernels.engine.config import dump_config
from grcsf_kernels.engine.evaluate import table
from grcsf_kernels.engine.report import console

app = typer.Typer(
    help="Lesion segmentation with GRCSF: pretrain, residuals, train, predict, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_CONFIGS = {
    "pretrain": engine.PretrainConfig,
    "residuals": engine.ResidualsConfig,
    "train": engine.TrainConfig,
    "predict": engine.PredictConfig,
    "evaluate": engine.EvaluateConfig,
}


class _Topic(str, Enum):
    pretrain = "pretrain"
    residuals = "residuals"
    train = "train"
    predict = "predict"
    evaluate = "evaluate"


Config = TypeVar("Config")
Data = Annotated[Path, typer.Argument(help="<case>_image.nii.gz, images/, nnU-Net or BIDS.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for what is written.")]
Settings = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML; all settings: grcsf config COMMAND.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda; before the one in --config.")]
Seed = Annotated[int | None, typer.Option(help="Before the one in --config.")]
Epochs = Annotated[int | None, typer.Option(help="Before the one in --config.")]
Autoencoders = Annotated[
    list[Path] | None,
    typer.Option("--autoencoder", "-a", help="A file of grcsf pretrain; once for each map."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make finished cases again.")]


def _command(function: Callable[..., engine.Report | None]) -> Callable[..., None]:
    """Errors of the user's files are one line; exit status 1 if anything failed or was skipped."""

    @app.command(name=function.__name__)
    @functools.wraps(function)
    def run(**options: Any) -> None:
        # Under torchrun: the first process reports, the others say which they are.
        rank = os.environ.get("RANK", "0")
        label = "error" if rank == "0" else f"error in process {rank}"
        try:
            report = function(**options)
        except engine.InputError as error:
            typer.echo(f"{label}: {error}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            # A full disk, a folder without permission, a file where a folder is meant.
            where = error.filename or options.get("output")
            problem = f"{where}: {error.strerror or error}; check the path, the disk's space"
            typer.echo(f"{label}: {problem} and the permissions", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("stopped: what is finished is kept, the same call goes on", err=True)
            raise typer.Exit(130) from None
        # A process of a training that is not the first has read the same cases as the first.
        if report is not None and report.failed and not console.quiet:
            typer.echo(f"{len(report.failed)} input(s) skipped, see above", err=True)
            raise typer.Exit(1)

    return run


def _first_says(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(path)


def _settings(cls: type[Config], path: Path | None, part: str = "", **overrides: Any) -> Config:
    """The configuration of a file, or the defaults; options that were given come before it."""
    config = cls() if path is None else engine.load_config(cls, path)
    target = getattr(config, part) if part else config
    for name, value in overrides.items():
        if value is not None:
            setattr(target, name, value)
    return config


@_command
def pretrain(
    data: Data,
    output: Output,
    config: Settings = None,
    device: Device = None,
    seed: Seed = None,
    epochs: Epochs = None,
) -> engine.Report:
    """Pretrain one masked autoencoder for each mask ratio; labels are not needed.

    Writes mae_50.safetensors, mae_75.safetensors. The same call again goes on where a stopped run
    was.
    """
    report = engine.Report()
    settings = _settings(
        engine.PretrainConfig, config, "optimization", device=device, seed=seed, epochs=epochs
    )
    for path in engine.pretrain(data, output, settings, report):
        _first_says(path)
    return report


@_command
def residuals(
    data: Data,
    output: Output,
    autoencoder: Autoencoders = None,
    overwrite: Overwrite = False,
    config: Settings = None,
    device: Device = None,
    seed: Seed = None,
) -> engine.Report:
    """Write the residual maps of every image: <case>_residual.nii.gz, one map after the other.

    Cases that are finished are kept, and shared under torchrun, as by grcsf predict.
    """
    settings = _settings(engine.ResidualsConfig, config, device=device, seed=seed)
    return engine.cache_residuals(data, autoencoder or [], output, settings, overwrite=overwrite)


@_command
def train(
    data: Data,
    output: Output,
    residuals: Annotated[
        Path | None, typer.Option(help="Folder of grcsf residuals; needed with model.use_rcu.")
    ] = None,
    config: Settings = None,
    device: Device = None,
    seed: Seed = None,
    epochs: Epochs = None,
    fold: Annotated[
        int | None, typer.Option(help="With folds or splits_file; before the one in --config.")
    ] = None,
) -> engine.Report:
    """Train GRCSF on images with labels: writes model.safetensors.

    The same call again goes on where a stopped run was.
    """
    report = engine.Report()
    settings = _settings(
        engine.TrainConfig, config, "optimization", device=device, seed=seed, epochs=epochs
    )
    if fold is not None:
        settings.fold = fold
    _first_says(engine.train(data, output, settings, residuals, report))
    return report


@_command
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="NIfTI files, folders of them, or .txt files with one path a line."),
    ],
    checkpoint: Annotated[
        list[Path],
        typer.Option("--model", "-m", help="A file of grcsf train; several are an ensemble."),
    ],
    output: Output,
    autoencoder: Autoencoders = None,
    residuals: Annotated[
        Path | None, typer.Option(help="Folder of grcsf residuals, instead of --autoencoder.")
    ] = None,
    probabilities: Annotated[
        bool | None, typer.Option("--probabilities", help="Write the probabilities as well.")
    ] = None,
    uncertainty: Annotated[
        bool | None, typer.Option("--uncertainty", help="Write their entropy in bits as well.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Before the one in --config.")] = None,
    overwrite: Overwrite = False,
    config: Settings = None,
    device: Device = None,
) -> engine.Report:
    """Segment images: <case>_mask.nii.gz in the image's own space.

    Cases that are finished are kept: the same call goes on where a stopped one was. Under torchrun
    every process does its share.
    """
    settings = _settings(
        engine.PredictConfig,
        config,
        device=device,
        probabilities=probabilities,
        uncertainty=uncertainty,
        threshold=threshold,
    )
    if device is not None:
        settings.residuals.device = device
    return engine.predict(
        images if len(images) > 1 else images[0],
        checkpoint,
        output,
        settings,
        autoencoder or [],
        residuals,
        overwrite=overwrite,
    )


@_command
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of <case>_mask.nii.gz.")],
    labels: Annotated[Path, typer.Argument(help="Folder of images with labels.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for what is written; that of the masks."),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="Cases whose slices are shown; before the one in --config.")
    ] = None,
    lesion_label: Annotated[
        list[int] | None, typer.Option(help="A label value that is a lesion; once for each.")
    ] = None,
    config: Settings = None,
) -> engine.Report:
    """Measure masks against labels: Dice, lesion F1, HD95 and more, per case and mean.

    Writes evaluation.json, and evaluation.html with plots and slices.
    """
    report = engine.Report()
    lesion_labels = tuple(lesion_label) if lesion_label else None
    settings = _settings(engine.EvaluateConfig, config, cases=cases, lesion_labels=lesion_labels)
    Console().print(table(engine.evaluate(predictions, labels, output, report, settings)))
    typer.echo(Path(output or predictions) / "evaluation.html")
    return report


@_command
def export(
    model: Annotated[Path, typer.Argument(help="A file of grcsf train or grcsf pretrain.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file: .onnx or .pt2.")],
) -> None:
    """Write a model as ONNX or as a torch.export program, for use without this library.

    For crops of the training's size, in batches of any size. The file is kept only if it gives the
    same output.
    """
    from grcsf_kernels.engine.export import export_model

    typer.echo(export_model(model, output))


@_command
def config(
    command: Annotated[_Topic, typer.Argument(help="The command.")],
) -> None:
    """Print all settings of a command with their defaults, as YAML."""
    typer.echo(dump_config(_CONFIGS[command.value]()), nl=False)


@_command
def doctor() -> None:
    """Say what this installation can do, and why something is missing."""
    from grcsf_kernels.doctor import main

    main()


@_command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Pretrain, train and segment on a real brain with synthetic lesions, in a few minutes."""
    from grcsf_kernels.engine.demo import run_demo

    run_demo(output, seed=seed)

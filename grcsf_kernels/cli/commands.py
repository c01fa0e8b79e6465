# SPDX-License-Identifier: Apache-2.0
"""The commands of ``grcsf``: options in, one function of the engine each."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from grcsf_kernels import engine
from grcsf_kernels._version import __version__
from grcsf_kernels.cli.guard import discard_output, explain, say
from grcsf_kernels.common.errors import printable, show_traceback
from grcsf_kernels.common.settings import update
from grcsf_kernels.engine.config import PRESETS, dump_config
from grcsf_kernels.engine.config import preset as preset_settings
from grcsf_kernels.engine.evaluation.evaluate import show
from grcsf_kernels.engine.report import console

# What typer raises for a wrong command line, beside the one that is public.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _OneLine(TyperGroup):
    """A wrong command line is one line and the exit status 2."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line."""
        args = sys.argv[1:] if args is None else list(args)
        try:
            status = super().main(args or ["--help"], "grcsf", complete_var, False, **extra)
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            command = "grcsf" if context is None else context.command_path
            problem = " ".join(error.format_message().split()).rstrip(".")
            say(f"error: {printable(problem)}; {command} --help shows what there is")
            status = 2
        except BaseException as error:
            line, status = explain(error, "grcsf")
            show_traceback(error)
            say(line)
        if not standalone_mode:
            return status
        raise SystemExit((status if isinstance(status, int) else 0) if args else 2)


app = typer.Typer(
    cls=_OneLine,
    help="Lesion segmentation with GRCSF: pretrain, residuals, train, predict, evaluate.",
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
_Topic = Enum("_Topic", {name: name for name in _CONFIGS}, type=str)  # type: ignore[misc]
_Preset = Enum("_Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]

# Names of files, which a folder for what is written does not have.
_FILES = (".nii", ".nii.gz", ".safetensors", ".yaml", ".json", ".html")

Config = TypeVar("Config")
Data = Annotated[Path, typer.Argument(help="<case>_image.nii.gz, images/, nnU-Net or BIDS.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Output folder.")]
Settings = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML; all settings: grcsf config COMMAND.")
]
Preset = Annotated[
    _Preset | None,
    typer.Option(help="small: to try it on a CPU in about an hour; --config overrides it."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda; overrides --config.")]
Seed = Annotated[int | None, typer.Option(help="Overrides --config.")]
Epochs = Annotated[int | None, typer.Option(help="Overrides --config.")]
Autoencoders = Annotated[
    list[Path] | None,
    typer.Option("--autoencoder", "-a", help="A file of grcsf pretrain; once for each map."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Recompute finished cases.")]


def _command(function: Callable[..., engine.Report | None]) -> Callable[..., None]:
    """Whatever it raises is one line; exit status 1 if anything failed or was skipped."""

    @app.command(name=function.__name__)
    @functools.wraps(function)
    def run(**options: Any) -> None:
        try:
            report = function(**options)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BaseException as error:
            line, status = explain(error, f"grcsf {function.__name__}", options.get("output"))
            show_traceback(error)
            if isinstance(error, BrokenPipeError):
                discard_output()
            say(line)
            raise typer.Exit(status) from error
        # A process of a training that is not the first has read the same cases as the first.
        if report is not None and report.failed and not console.quiet:
            say(f"{len(report.failed)} input(s) skipped, see above")
            raise typer.Exit(1)

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grcsf-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _folder(output: Path, *inputs: Path | None) -> Path:
    """``output``, if it can be the folder of what is written beside these folders of inputs.

    Raises:
        InputError: a file, the name of one, an input, or a place where nothing can be written.
    """
    named = output.name.lower().endswith(_FILES)
    if output.is_file() or (named and not output.is_dir()):
        found = "is a file" if output.is_file() else "is the name of a file"
        raise engine.InputError(output, found, "expected a folder for what is written")
    for folder in inputs:
        if folder is not None and folder.is_dir() and folder.resolve() == output.resolve():
            remedy = "name another one: what is written would be read as input"
            raise engine.InputError(output, "is the folder of the input", remedy)
    there = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise engine.InputError(output, f"can't be made: {there} is a file", "name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "name another folder, or see to its permissions"
        raise engine.InputError(output, f"can't be written: {there} is read-only", remedy)
    return output


def _first_says(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(printable(path))


def _settings(
    cls: type[Config],
    path: Path | None,
    options: dict[str, Any] | None = None,
    part: str = "",
    base: Config | None = None,
) -> Config:
    """The settings of a file over those of ``base``; options that were given come before both.

    Args:
        cls: of the settings.
        path: the YAML file; None: no file.
        options: the settings that options name; None where an option was not given.
        part: where they are, such as ``"optimization"``; empty: at the top.
        base: what the file leaves out; None: the defaults.
    """
    config = base or cls()
    if path is not None:
        config = engine.load_config(cls, path, config)
    for name, value in (options or {}).items():
        if value is not None:
            # An error names the option.
            update(getattr(config, part) if part else config, {name: value}, "command line")
    return config


@_command
def pretrain(
    data: Data,
    output: Output,
    config: Settings = None,
    device: Device = None,
    seed: Seed = None,
    epochs: Epochs = None,
    preset: Preset = None,
) -> engine.Report:
    """Pretrain one masked autoencoder for each mask ratio; labels are not needed.

    Writes mae_50.safetensors, mae_75.safetensors. The same call again goes on where a stopped run
    was.
    """
    report = engine.Report()
    options = {"device": device, "seed": seed, "epochs": epochs}
    base = None if preset is None else preset_settings(preset.value, "pretrain")
    settings = _settings(engine.PretrainConfig, config, options, "optimization", base)
    for path in engine.pretrain(data, _folder(output, data), settings, report):
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
    settings = _settings(engine.ResidualsConfig, config, {"device": device, "seed": seed})
    folder = _folder(output, data)
    return engine.cache_residuals(data, autoencoder or [], folder, settings, overwrite=overwrite)


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
        int | None, typer.Option(help="With folds or splits_file; overrides --config.")
    ] = None,
    preset: Preset = None,
) -> engine.Report:
    """Train GRCSF on images with labels: writes model.safetensors.

    The same call again goes on where a stopped run was.
    """
    report = engine.Report()
    options = {"device": device, "seed": seed, "epochs": epochs}
    base = None if preset is None else preset_settings(preset.value, "train")
    settings = _settings(engine.TrainConfig, config, options, "optimization", base)
    settings = _settings(engine.TrainConfig, None, {"fold": fold}, base=settings)
    _first_says(engine.train(data, _folder(output, data, residuals), settings, residuals, report))
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
    threshold: Annotated[float | None, typer.Option(help="Overrides --config.")] = None,
    overwrite: Overwrite = False,
    config: Settings = None,
    device: Device = None,
) -> engine.Report:
    """Segment images: <case>_mask.nii.gz in the image's own space.

    Cases that are finished are kept: the same call goes on where a stopped one was. Under torchrun
    every process does its share.
    """
    options = {
        "device": device,
        "probabilities": probabilities,
        "uncertainty": uncertainty,
        "threshold": threshold,
    }
    settings = _settings(engine.PredictConfig, config, options)
    settings = _settings(engine.PredictConfig, None, {"device": device}, "residuals", settings)
    return engine.predict(
        images if len(images) > 1 else images[0],
        checkpoint,
        _folder(output, *images, residuals),
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
        typer.Option("--output", "-o", help="Output folder (default: PREDICTIONS)."),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="Cases whose slices are shown; overrides --config.")
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
    options = {"cases": cases, "lesion_labels": lesion_label or None}
    settings = _settings(engine.EvaluateConfig, config, options)
    if output is not None:
        _folder(output, labels)
    show(engine.evaluate(predictions, labels, output, report, settings))
    typer.echo(printable(Path(output or predictions) / "evaluation.html"))
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
    from grcsf_kernels.engine.inference.export import export_model

    typer.echo(printable(export_model(model, output)))


@_command
def config(
    command: Annotated[_Topic, typer.Argument(help="The command.")],
    preset: Preset = None,
) -> None:
    """Print all settings of a command with their defaults and what they mean, as YAML.

    What is printed is a file for --config; a file may leave out what is not to change.
    """
    name = command.value
    settings = _CONFIGS[name]() if preset is None else preset_settings(preset.value, name)
    typer.echo(dump_config(settings, comments=True), nl=False)


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
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Pretrain, train and segment on a real brain with synthetic lesions, in a few minutes."""
    from grcsf_kernels.demo import run_demo

    run_demo(_folder(output), seed=seed)

# SPDX-License-Identifier: Apache-2.0
"""Trials of residual maps: one thing about their making is different."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report.report import table
from benchmarks.study import protocol, ranking, runs
from benchmarks.study.comparison import mean_of, with_interval
from benchmarks.study.context import context_errors
from benchmarks.study.runs import Study
from grcsf_kernels import engine
from grcsf_kernels.models import autoencoder

Change = Callable[[engine.PretrainConfig], engine.PretrainConfig]
Triple = tuple[int, int, int]

AS_IS = "as-in-the-study"  # key of autoencoders and maps that are those of the study
SETS = ("development", "development_held_out")


def _model(**changes: Any) -> Change:
    return lambda config: dataclasses.replace(
        config, model=dataclasses.replace(config.model, **changes)
    )


def _third(config: engine.PretrainConfig) -> engine.PretrainConfig:
    steps = config.optimization.steps_per_epoch // 3
    optimization = dataclasses.replace(config.optimization, steps_per_epoch=max(1, steps))
    return dataclasses.replace(config, optimization=optimization)


def _whole_brain(config: engine.PretrainConfig) -> engine.PretrainConfig:
    """One crop a step, so large that it has the brain in it: a patch's index tells its place."""
    x, y, z = (
        int(size * factor) // patch * patch
        for size, factor, patch in zip(
            config.crop_size, (1.25, 1.5, 1.25), config.model.patch_size, strict=True
        )
    )
    optimization = dataclasses.replace(config.optimization, batch_size=1)
    return dataclasses.replace(config, crop_size=(x, y, z), optimization=optimization)


def _at_first(config: engine.PretrainConfig) -> engine.PretrainConfig:
    """As the first run of the study had it, but for the steps."""
    model = _model(position_base=10000.0, decoder_dim=config.model.decoder_dim // 2)
    return _whole_brain(model(config))


def _other_target(config: engine.PretrainConfig) -> engine.PretrainConfig:
    return _model(normalized_target=not config.model.normalized_target)(config)


def _scaled(sizes: Triple, factor: float) -> Triple:
    x, y, z = (int(size * factor) for size in sizes)
    return x, y, z


def _twice_patch(config: engine.PretrainConfig) -> engine.PretrainConfig:
    """An eighth of the patches in the same crop."""
    return _model(patch_size=_scaled(config.model.patch_size, 2))(config)


def _half_patch(config: engine.PretrainConfig) -> engine.PretrainConfig:
    """As many patches as before, each half as long."""
    changed = _model(patch_size=_scaled(config.model.patch_size, 0.5))(config)
    return dataclasses.replace(changed, crop_size=_scaled(config.crop_size, 0.5))


@dataclasses.dataclass(frozen=True)
class Making:
    """What is different.

    Attributes:
        change: of the settings of pretraining; all of these trials have a third of the steps.
            None: the autoencoders are as in the study.
        subjects: that the autoencoders learn from.
        draws: masks of a map.
        keys_apart: attention begins with keys that are independent of the queries.
    """

    change: Change | None = None
    subjects: str = SETS[0]
    draws: int = protocol.DRAWS
    keys_apart: bool = False


_AS_LONG = "a third of the steps"  # what trials with other autoencoders are compared with
MAPS = {
    "as in the study": Making(),
    "16 draws": Making(draws=16),
    _AS_LONG: Making(lambda config: config),
    "keys apart from queries": Making(lambda config: config, keys_apart=True),
    "position base 10000": Making(_model(position_base=10000.0)),
    "the whole brain at once": Making(_whole_brain),
    "all three and half the decoder, as at first": Making(_at_first, keys_apart=True),
    "other target": Making(_other_target),
    "healthy subjects": Making(lambda config: config, "development_healthy"),
    "patches twice as long": Making(_twice_patch),
    "patches half as long": Making(_half_patch),
}


@contextmanager
def replaced(cls: type, name: str, function: Callable[..., None]) -> Iterator[None]:
    """A method of a class is another one inside."""
    kept = getattr(cls, name)
    setattr(cls, name, function)
    try:
        yield
    finally:
        setattr(cls, name, kept)


def _result_path(study: Study, kind: str, name: str) -> Path:
    """The result of a trial."""
    return study.out / "causes" / f"{kind}-{name.replace(' ', '-').replace(',', '')}.json"


def _identity(study: Study) -> dict[str, Any]:
    """What all trials begin with; a result with another one is old."""
    return protocol.identity(study.scale, protocol.ARMS["rcu"], 0)


def is_finished(study: Study, kind: str, name: str) -> bool:
    """Whether the result of a trial is there."""
    return runs.is_current(_result_path(study, kind, name), _identity(study))


def finish(study: Study, kind: str, name: str, content: dict[str, Any]) -> None:
    """Save the result of a trial."""
    runs.save(
        _result_path(study, kind, name),
        {
            "kind": kind,
            "name": name,
            "identity": _identity(study),
            **content,
            "machine": runs.machine(),
        },
    )


def maps_folder(study: Study, key: str, masking: str, draws: int, subjects: str) -> Path:
    """The maps of a trial."""
    return study.work / "causes" / f"{key}-{masking}-{draws}" / subjects


def try_maps(study: Study, name: str) -> None:
    """AUC on development subjects, and how far the autoencoders look at the image."""
    if is_finished(study, "maps", name):
        return
    trial = MAPS[name]
    config = protocol.pretraining(study.scale, 0)
    key, maskings = AS_IS, protocol.MASKINGS
    if trial.change is not None:
        config = _third(trial.change(config))
        key, maskings = name.replace(" ", "-"), protocol.MASKINGS[1:]
    attention = autoencoder._Attention
    method = (lambda _: None) if trial.keys_apart else attention.reset_parameters
    with replaced(attention, "reset_parameters", method):
        paths = engine.pretrain(study.work / trial.subjects, study.work / "causes" / key, config)
    folders = {}
    for masking in maskings:
        settings = dataclasses.replace(protocol.residuals(masking, 0), draws=trial.draws)
        folders[masking] = maps_folder(study, key, masking, trial.draws, SETS[1])
        runs.expect_all(
            engine.cache_residuals(study.work / SETS[1], paths, folders[masking], settings)
        )
    areas = runs.rank_maps(study.work / SETS[1], folders, study.scale)
    errors = context_errors(study.work / SETS[1], paths)
    finish(study, "maps", name, {"areas": areas, "context": errors})


def tables(found: dict[str, Any]) -> list[str]:
    """The trials that there are, by name, as Markdown."""
    names = [name for name in MAPS if name in found]
    if not names:
        return []
    lines = []
    for name in names:
        base = _AS_LONG if MAPS[name].change else next(iter(MAPS))
        for score, cases in found[name]["areas"].items():
            plain = "hidden" not in score
            if plain and name != next(iter(MAPS)):
                continue  # darkness and edges are the same in every trial
            summary = ranking.summarize(list(cases.values()))
            areas = (f"{row['mean']:.3f}" for row in summary.values())
            less = ""
            if name != base and base in found:
                others = found[base]["areas"][score]
                changes = [
                    area[ranking.ALL] - others[case][ranking.ALL] for case, area in cases.items()
                ]
                less = with_interval(mean_of(changes), signed=True)
            lines.append(["" if plain else name, score, *areas, less])
    head = ["trial", "score", *summary, "all, less as in the study or less a third of the steps"]
    errors = [
        [name, hidden, f"{row['own']:.3f}", f"{row['other']:.3f}"]
        for name in names
        for hidden, row in found[name]["context"].items()
    ]
    return [
        "### Maps: ROC AUC",
        table(head, lines),
        "### Autoencoders: error over variance",
        table(["trial", "hidden", "from the same subject", "from another subject"], errors),
    ]

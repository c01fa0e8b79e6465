# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.study.causes``: why a unit helps or does not, one cause at a time.

On development subjects, which no table of the study's results uses. Four kinds of trials:

* *maps*: how well residual maps rank lesions when one thing about their making is different.
* *information*: what plain models of the voxels gain from the maps, beyond the image.
* *attention*: what an RCU makes of maps that are the lesions themselves. Whatever is missing to a
  perfect segmentation there is not the maps' fault.
* *network*: what it makes of real maps.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.report.report import table
from benchmarks.study import making, protocol, runs
from benchmarks.study.comparison import with_interval
from benchmarks.study.difficulty import measure_difficulty
from benchmarks.study.making import AS_IS, MAPS, SETS, finish, is_finished, maps_folder, replaced
from benchmarks.study.pool import exit_status, make_parser, opened, run_all
from benchmarks.study.protocol import Arm
from benchmarks.study.runs import Study
from grcsf_kernels import engine
from grcsf_kernels.nn import RCU

KINDS = ("maps", "information", "attention", "network")
_LESS = 2  # as many steps where the lesions are the maps: they are learnt sooner


def _quiet_init(unit: RCU) -> None:
    """The branch adds nothing at first."""
    _KEPT(unit)
    for output in unit.output:
        torch.nn.init.zeros_(output.weight)
        torch.nn.init.zeros_(output.bias)


def _loud_init(unit: RCU) -> None:
    """Attention that tells voxels of a patch apart at once, and a branch that adds more at first.

    Keys and queries as they are make the softmax of maps in [0, 1] nearly uniform.
    """
    _KEPT(unit)
    with torch.no_grad():
        for key, value, output in zip(unit.key, unit.value, unit.output, strict=True):
            key.weight.mul_(10)
            value.weight.mul_(3)
            value.bias.zero_()
            output.bias.zero_()


_KEPT = RCU.reset_parameters
INITS: dict[str, Callable[[RCU], None]] = {
    "default": _KEPT,
    "zero output": _quiet_init,
    "keys x 10, values x 3": _loud_init,
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One thing that is different in the network.

    Attributes:
        init: of the RCUs.
        levels: of the decoder, with an RCU.
        patch: edge of the RCU's patches, voxels of their level.
        maps: what is done with them: ``"attended"`` to by the RCU; without an RCU ``"channels"`` of
            the image, or ``"unused"``.
    """

    init: str = "default"
    levels: tuple[int, ...] = (0,)
    patch: int = 4
    maps: str = "attended"


ATTENTION = {
    "default": Trial(),
    **{name: Trial(init=name) for name in INITS if name != "default"},
    "level 1": Trial(levels=(1,)),
    "level 1, patches of 2": Trial(levels=(1,), patch=2),
    "levels 0, 1 and 2": Trial(levels=(0, 1, 2)),
    "patches of 8": Trial(patch=8),
    "patches of 2": Trial(patch=2),
}
NETWORK = {
    "default": Trial(),
    "no maps": Trial(maps="unused"),
    "keys x 10, values x 3": Trial(init="keys x 10, values x 3"),
    "level 1": Trial(levels=(1,)),
    "levels 0, 1 and 2": Trial(levels=(0, 1, 2)),
    "patches of 8": Trial(patch=8),
    "maps as channels of the image": Trial(maps="channels"),
}


def _real_maps(study: Study, subjects: str) -> Path:
    """The folder of maps that are made as in the study."""
    return maps_folder(study, AS_IS, "random", protocol.DRAWS, subjects)


def _lesions_as_maps(study: Study, subjects: str) -> Path:
    """A folder of residual maps that are the labels, as if they came from real ones."""
    real = _real_maps(study, subjects)
    folder = study.work / "causes" / "lesions" / subjects
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{subjects}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shutil.copy(real / "residuals.json", temporary)
    for path in real.glob("*_residual.nii.gz"):
        label: Any = nib.load(study.work / subjects / path.name.replace("_residual", "_label"))
        lesion = (np.asarray(label.dataobj) > 0).astype(np.float32)
        maps = np.repeat(lesion[..., None], len(protocol.MASK_RATIOS), axis=-1)
        nib.save(nib.Nifti1Image(maps, label.affine), temporary / path.name)
    temporary.rename(folder)
    return folder


def prepare_maps(study: Study) -> None:
    """Real maps of both development sets, and the lesions as maps."""
    config = protocol.pretraining(study.scale, 0)
    folder = study.work / "causes" / AS_IS
    paths = engine.pretrain(study.work / SETS[0], folder, config)
    for subjects in SETS:
        target = _real_maps(study, subjects)
        settings = protocol.residuals("random", 0)
        runs.expect_all(engine.cache_residuals(study.work / subjects, paths, target, settings))
        _lesions_as_maps(study, subjects)


def try_information(study: Study) -> None:
    """Dice of plain models with and without the maps."""
    if is_finished(study, "information", "trees"):
        return
    data = [study.work / subjects for subjects in SETS]
    first, second = (_real_maps(study, subjects) for subjects in SETS)
    measured = measure_difficulty(*data, (first, second))
    finish(study, "information", "trees", {"models": measured})


def _with_channels(data: Path, maps: Path, folder: Path) -> Path:
    """The subjects of ``data`` with their maps as further channels: nnU-Net's raw layout."""
    names = ["T1", *(f"map {ratio:.0%}" for ratio in protocol.MASK_RATIOS)]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for path in sorted(maps.glob("*_residual.nii.gz")):
        case = path.name.removesuffix("_residual.nii.gz")
        residual: Any = nib.load(path)
        for index in range(residual.shape[-1]):
            image = nib.Nifti1Image(residual.dataobj[..., index], residual.affine)
            nib.save(image, folder / "imagesTr" / f"{case}_{index + 1:04d}.nii.gz")
        shutil.copy(data / f"{case}_image.nii.gz", folder / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copy(data / f"{case}_label.nii.gz", folder / "labelsTr" / f"{case}.nii.gz")
    runs.save(
        folder / "dataset.json",
        {
            "channel_names": {str(index): name for index, name in enumerate(names)},
            "labels": {"background": 0, "lesion": 1},
            "numTraining": len(list(folder.glob("labelsTr/*"))),
            "file_ending": ".nii.gz",
        },
    )
    return folder


def try_network(study: Study, kind: str, name: str, seed: int) -> None:
    """Train with one thing different and measure development subjects."""
    title = f"{name} {seed}"
    if is_finished(study, kind, title):
        return
    scale = study.scale
    trial = {"attention": ATTENTION, "network": NETWORK}[kind][name]
    steps = scale.steps // _LESS if kind == "attention" else scale.steps
    scale = dataclasses.replace(scale, rcu_levels=trial.levels, rcu_patch=trial.patch, steps=steps)
    data = [study.work / subjects for subjects in SETS]
    source = _lesions_as_maps if kind == "attention" else _real_maps
    maps: list[Path | None] = [source(study, subjects) for subjects in SETS]
    folder = study.work / "causes" / f"{kind}-{title.replace(' ', '-')}"
    arm = Arm(name, masking="random" if trial.maps == "attended" else None)
    if trial.maps == "channels":
        data = [
            _with_channels(images, residuals, folder / images.name)
            for images, residuals in zip(data, maps, strict=True)
            if residuals is not None
        ]
    if trial.maps != "attended":
        maps = [None, None]
    config = protocol.training(scale, arm, seed)
    with replaced(RCU, "reset_parameters", INITS[trial.init]):
        measured = runs.train_and_measure(data, maps, config, folder, scale)
    finish(study, kind, title, {"variant": name, "seed": seed, **measured})


_HEAD = ["model of the voxels", "Dice", "lesion F1"]


def tables(out: Path) -> list[str]:
    """The trials that there are, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted((out / "causes").glob("*.json"))]
    parts = making.tables({entry["name"]: entry for entry in found if entry["kind"] == "maps"})
    for entry in found:
        if entry["kind"] == "information":
            lines = [
                [name, *(with_interval(row[measure]) for measure in ("dice", "lesion_f1"))]
                for name, row in entry["models"].items()
            ]
            parts += ["### What maps know beyond the image", table(_HEAD, lines)]
    for kind, variants, title in (
        ("attention", ATTENTION, "### Attention to the lesions themselves: Dice"),
        ("network", NETWORK, "### Attention to residual maps: Dice"),
    ):
        lines = []
        for name in variants:
            scores = {
                entry["seed"]: float(np.mean([c["dice"] for c in entry["cases"].values()]))
                for entry in found
                if entry["kind"] == kind and entry["variant"] == name
            }
            if scores:
                seeds = " ".join(f"{scores[seed]:.3f}" for seed in sorted(scores))
                lines.append([name, f"{np.mean(list(scores.values())):.3f}", seeds])
        if lines:
            parts += [title, table(["trial", "mean", "by seed"], lines)]
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Run the trials that are missing; the exit status is 1 where one failed."""
    parser = make_parser("python -m benchmarks.study.causes", __doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args(arguments)
    study, jobs = opened(options)
    names = (*SETS, "development_healthy")
    failed = run_all([(runs.make_subjects, (study, name)) for name in names], jobs)
    failed += run_all([(prepare_maps, (study,))], 1)
    jobs_of: list[Any] = []
    if "maps" in options.kinds:
        jobs_of += [(making.try_maps, (study, name)) for name in MAPS]
    if "information" in options.kinds:
        jobs_of += [(try_information, (study,))]
    for kind, variants in (("attention", ATTENTION), ("network", NETWORK)):
        if kind in options.kinds:
            jobs_of += [
                (try_network, (study, kind, name, seed))
                for seed in options.seeds
                for name in variants
            ]
    failed += run_all(jobs_of, jobs)
    return exit_status(failed)


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Segmentation of images with trained networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grcsf_kernels.common.atomic_files import remove_leftovers
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.finite import is_finite
from grcsf_kernels.common.settings import check
from grcsf_kernels.engine.buffers import Scratch
from grcsf_kernels.engine.config import PredictConfig
from grcsf_kernels.engine.data.resampling import Placement, load_placed, place_maps
from grcsf_kernels.engine.data.samples import Preprocessing, Sample, check_channels, check_size
from grcsf_kernels.engine.diagnosis import NotFiniteError, cause_named
from grcsf_kernels.engine.identity import unlike
from grcsf_kernels.engine.inference.postprocessing import remove_small
from grcsf_kernels.engine.inference.residuals import VolumeMaps
from grcsf_kernels.engine.inference.sharding import shard, wait_for_others
from grcsf_kernels.engine.inference.sliding_window import (
    SlidingWindow,
    inference_device,
    mirrors_of,
    network_predictor,
    report_out_of_memory,
)
from grcsf_kernels.engine.io.datasets import Case, find_cases
from grcsf_kernels.engine.io.fingerprint import Fingerprint, is_finished
from grcsf_kernels.engine.io.nifti import read_residual, write_volume
from grcsf_kernels.engine.io.provenance import CachedMaps
from grcsf_kernels.engine.io.search import one_each
from grcsf_kernels.engine.io.sources import read_list
from grcsf_kernels.engine.model_files import Checkpoint, load_checkpoint
from grcsf_kernels.engine.report import Report, for_each, warn
from grcsf_kernels.models.inputs import DataConfig, compare_maps
from grcsf_kernels.nn import RCU


def predict(
    images: Path | Sequence[Path],
    checkpoint: Path | Sequence[Path],
    output: Path,
    config: PredictConfig,
    autoencoders: Sequence[Path] = (),
    residuals: Path | None = None,
    report: Report | None = None,
    *,
    overwrite: bool = False,
) -> Report:
    """Segment images.

    A case whose outputs are there, whole, and from the same image, models and settings is finished
    and kept. So the same call goes on where a stopped one was, and with the environment variables
    ``RANK`` and ``WORLD_SIZE`` (torchrun sets them) each process takes every n-th case. What goes
    wrong with one case is reported and stops no other, but for a full disk.

    Args:
        images: a NIfTI file, a folder, a ``.txt`` file with one path a line, or several of them.
        checkpoint: the model file of :func:`grcsf_kernels.engine.train`; several are an ensemble,
            of which the mean probability counts.
        output: gets ``<case>_mask.nii.gz`` (uint8, 0 and 1) in the image's own space, and on
            request ``<case>_probability.nii.gz`` (float32) and ``<case>_uncertainty.nii.gz``
            (float32, entropy of the probability in bits).
        config: settings.
        autoencoders: model files that make the residual maps; for a network with an RCU, these or
            ``residuals``.
        residuals: the folder of :func:`grcsf_kernels.engine.cache_residuals`.
        report: takes what was done (finished before or now) and skipped; None: a new one.
        overwrite: make finished cases again.

    Returns:
        The report.

    Raises:
        InputError: no image, or model files that can't be used or do not belong
            together.
        OSError: the disk is full.
    """
    report = Report() if report is None else report
    check(config)
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    ensemble = _Ensemble.load(paths, config)
    maps, cached = _choose_maps(ensemble, paths[0], autoencoders, residuals, config)
    Path(output).mkdir(parents=True, exist_ok=True)
    predictor = _CasePredictor(
        config=config,
        ensemble=ensemble,
        preprocessing=Preprocessing(ensemble.data),
        maps=maps,
        cached=cached,
        fingerprint=Fingerprint(config, [*paths, *(() if maps is None else maps.paths)]),
        output=Path(output),
        overwrite=overwrite,
    )
    cases = find_images(images, report, ensemble.data.bids_suffixes)
    for_each(shard(cases), predictor, report, "segmenting")
    wait_for_others()
    return report


def _choose_maps(
    ensemble: _Ensemble,
    model: Path,
    autoencoders: Sequence[Path],
    residuals: Path | None,
    config: PredictConfig,
) -> tuple[VolumeMaps | None, CachedMaps | None]:
    """What makes the residual maps, or what has them; neither where the networks take none."""
    if not ensemble.num_maps:
        return None, None
    if residuals is not None:
        cached = CachedMaps(residuals)
        ensemble.compare(cached.description, Path(residuals))
        return None, cached
    maps = _matching_maps(ensemble, model, autoencoders, config)
    ensemble.compare(maps.description, maps.paths[0])
    return maps, None


def _matching_maps(
    ensemble: _Ensemble, model: Path, autoencoders: Sequence[Path], config: PredictConfig
) -> VolumeMaps:
    """The autoencoders' residual maps.

    Raises:
        InputError: no autoencoders, or not those that the network was trained with.
    """
    if not autoencoders:
        raise InputError(
            model,
            "has region compensation units and needs residual maps",
            "name the autoencoders (--autoencoder) or the cached maps (--residuals)",
        )
    maps = VolumeMaps(autoencoders, config.residuals)
    remedy = "use the autoencoders that its residual maps came from"
    if maps.data != ensemble.data:
        raise InputError(
            maps.paths[0],
            "was trained with other preprocessing than the segmentation model: "
            + unlike(maps.data, ensemble.data),
            remedy,
        )
    if len(maps.paths) != ensemble.num_maps:
        raise InputError(
            model,
            f"takes {ensemble.num_maps} residual maps, and there are {len(maps.paths)} "
            "autoencoders",
            remedy,
        )
    return maps


@dataclass
class _CasePredictor:
    """From a case to its files; the path of the mask."""

    config: PredictConfig
    ensemble: _Ensemble
    preprocessing: Preprocessing
    maps: VolumeMaps | None  # makes residual maps
    cached: CachedMaps | None  # or has them
    fingerprint: Fingerprint
    output: Path
    overwrite: bool

    @property
    def kinds(self) -> list[str]:
        """What is written of each case."""
        config = self.config
        wanted = ["probability"] * config.probabilities + ["uncertainty"] * config.uncertainty
        return ["mask", *wanted]

    def paths_of(self, case: Case) -> dict[str, Path]:
        """The files of a case by kind."""
        return {kind: self.output / f"{case.name}_{kind}.nii.gz" for kind in self.kinds}

    def __call__(self, case: Case) -> Path:
        """Segment, and name an older mask that an error leaves standing."""
        try:
            return report_out_of_memory(self.segment)(case)
        except InputError as error:
            # It is not removed: what went wrong may be the model or a path, and masks take time.
            older = self.paths_of(case)["mask"]
            if not older.is_file():
                raise
            remedy = f"{error.remedy}; {older} is there from an earlier call, and not of this one"
            raise InputError(error.where, error.problem, remedy) from error

    def segment(self, case: Case) -> Path:
        """Segment, or keep what is finished."""
        outputs, config = self.paths_of(case), self.config
        of_case = None if self.cached is None else self.cached.path(case)
        description = self.fingerprint.of(case.name, case.images, of_case)
        if not self.overwrite and is_finished(outputs.values(), description):
            return outputs["mask"]
        for path in outputs.values():
            remove_leftovers(path)
        scratch = Scratch(self.output, config.accumulate, config.memory_gb * 1e9)
        sample, placement = load_placed(case, self.preprocessing, scratch)
        volume = sample.volume
        check_channels(sample, self.ensemble.channels, "the model takes")
        self.add_maps(sample, placement, of_case, scratch)
        probability = self.ensemble.probability(sample, scratch)
        del sample
        shape = volume.array.shape
        results = _restored(probability, placement, shape, self.kinds, config, scratch)
        del probability
        if config.min_lesion_mm3:
            voxel = abs(float(np.linalg.det(volume.affine[:3, :3])))
            remove_small(results["mask"], voxel, config.min_lesion_mm3, scratch)
        # The mask last: it is what says that a case is done.
        for kind in reversed(self.kinds):
            write_volume(outputs[kind], results.pop(kind), volume, description)
        return outputs["mask"]

    def add_maps(
        self, sample: Sample, placement: Placement, path: Path | None, scratch: Scratch
    ) -> None:
        """Give the case its residual maps, where the network takes some."""
        if path is not None:
            kept = read_residual(path, sample.volume, scratch)
            sample.residual = place_maps(kept, placement, self.config.precision, scratch)
        if self.maps is not None:
            check_size(sample, self.maps.patch, "the autoencoder's patch")
            own = self.config.residuals
            store = Scratch(self.output, own.accumulate, own.memory_gb * 1e9)
            sample.residual = self.maps(sample.image, sample.case.name, store)


def find_images(
    images: Path | Sequence[Path], report: Report, suffixes: Sequence[str] = ("T1w",)
) -> list[Case]:
    """The cases of files, folders and ``.txt`` files with one path a line, by name.

    Paths in a text file that are not absolute start at its folder. A path of several that can't be
    used is reported; a single one is an error. Images of one name, whose masks would be one file,
    are reported, and none of them is taken.

    Raises:
        InputError: there is no image, or a text file can't be read.
    """
    if isinstance(images, str | Path):
        paths, several = [Path(images)], False
    else:
        paths, several = [Path(path) for path in images], True
    listed: list[Path] = []
    for path in paths:
        if path.suffix.lower() == ".txt":
            several = True
            listed += read_list(path)
        else:
            listed.append(path)
    cases: list[Case] = []
    for path in listed:
        try:
            cases += find_cases(path, report, labels=False, suffixes=suffixes)
        except InputError as error:
            if not several:
                raise
            report.skip(path, str(error))
    if not cases:
        where = ", ".join(str(path) for path in paths) or "images"
        raise InputError(where, "no image was found", "name NIfTI files or folders of them")
    # An image that is named twice, by whatever path, is one.
    by_image = {case.image: case for case in {realpath(c.image): c for c in cases}.values()}
    chosen, _ = one_each(((case.name, image) for image, case in by_image.items()), report)
    if not chosen:
        raise InputError(cases[0].image, "has the name of all others", "rename them")
    return [by_image[image] for _, image in sorted(chosen.items())]


@dataclass
class _Ensemble:
    """Networks of which the mean probability counts.

    Attributes:
        members: model file, network on the device, its residual maps and windows, of each.
        data: the preprocessing of all.
        channels: of the images that they take.
        num_maps: residual maps that they take; 0: none does.
        made_by: what made the maps that each was trained with, as far as it is known.
        config: settings.
    """

    members: list[tuple[Path, nn.Module, int, SlidingWindow]]
    data: DataConfig
    channels: int
    num_maps: int
    made_by: list[dict[str, Any] | None]
    config: PredictConfig

    def compare(self, description: dict[str, Any] | None, where: Path) -> None:
        """Warn where residual maps differ from those that a network was trained with."""
        for trained in self.made_by:
            for note in compare_maps(trained, description, where):
                warn(note)

    @classmethod
    def load(cls, paths: Sequence[Path], config: PredictConfig) -> _Ensemble:
        """The networks of model files, with the settings that concern them."""
        if not paths:
            raise InputError("model", "none given", "pass --model FILE, a file of grcsf train")
        loaded = [load_checkpoint(path, "GRCSF") for path in paths]
        data, num_maps = loaded[0].data, 0
        channels = _channels_of(loaded[0])
        for path, checkpoint in zip(paths, loaded, strict=True):
            if checkpoint.data != data:
                raise InputError(
                    path,
                    f"was trained with other preprocessing than {paths[0]}: "
                    + unlike(checkpoint.data, data),
                    "use models of one training configuration",
                )
            if _channels_of(checkpoint) != channels:
                raise InputError(
                    path,
                    f"takes images of {_channels_of(checkpoint)} channel(s), and another model "
                    f"{channels}",
                    "use models of one training configuration",
                )
            count = _maps_of(checkpoint)
            if count and num_maps not in (0, count):
                raise InputError(
                    path,
                    f"takes {count} residual maps, and another model {num_maps}",
                    "use models of one training configuration",
                )
            num_maps = count or num_maps
        device = inference_device(config.device)
        scratch = Scratch(Path(), config.accumulate, 0)
        members = []
        for path, checkpoint in zip(paths, loaded, strict=True):
            for module in checkpoint.model.modules():
                if isinstance(module, RCU):
                    module.score_threshold = config.rcu_threshold
            windows = SlidingWindow(
                checkpoint.crop_size,
                config.overlap,
                config.batch_size,
                device,
                scratch.sums_on(device),
                config.skip_air,
                -math.inf,  # the logit of a probability of 0
            )
            network = checkpoint.model.to(device)
            members.append((path, network, _maps_of(checkpoint), windows))
        made_by = [checkpoint.maps for checkpoint in loaded if _maps_of(checkpoint)]
        return cls(members, data, channels, num_maps, made_by, config)

    def probability(self, sample: Sample, scratch: Scratch) -> Tensor:
        """Mean over networks and mirrored windows, [1, *S]: blended logits, then the sigmoid.

        Raises:
            InputError: the case has another number of residual maps.
            NotFiniteError: a network gives NaN or Inf.
        """
        if sample.residual is not None and sample.residual.shape[0] != self.num_maps:
            raise InputError(
                sample.case.image,
                f"has {sample.residual.shape[0]} residual maps, and the model takes "
                f"{self.num_maps}",
                "use the autoencoders that the model was trained with",
            )
        passes = [
            (*member, mirrored)
            for member in self.members
            for mirrored in mirrors_of(sorted(set(self.config.mirror_axes)))
        ]
        device = self.members[0][3].device
        space = sample.image.shape[1:]
        mean = scratch.results(1, space, self.config.precision, device)
        for index, (path, network, count, windows, mirrored) in enumerate(passes):
            take = _add_to(mean, 1 / len(passes), index == 0)
            given = {"image": sample.image.as_tensor()}
            if count:
                assert sample.residual is not None
                given["residual maps"] = sample.residual
            predictor = network_predictor(network, count, mirrored)
            with cause_named(str(path), network, given):
                windows(predictor, list(given.values()), 1, take, scratch.release)
        return mean


def _channels_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.model.in_channels)  # type: ignore[arg-type]


def _maps_of(checkpoint: Checkpoint) -> int:
    model = checkpoint.model
    return int(model.num_maps) if model.use_rcu else 0  # type: ignore[arg-type]


def _add_to(mean: Tensor, share: float, first: bool) -> Callable[[slice, Tensor], None]:
    """Adds the probabilities of logits to their mean."""

    def take(planes: slice, logits: Tensor) -> None:
        probability = (torch.sigmoid(logits) * share).to(mean.device)
        slab = mean[..., planes]
        slab.copy_(probability if first else slab + probability)

    return take


def entropy(probability: np.ndarray) -> np.ndarray:
    """Of a lesion that is there with a probability, in bits: 0 (certain) to 1 (p = 0.5)."""
    inside = np.clip(probability, 1e-12, 1 - 1e-7)
    bits = -(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside))
    return np.where((probability <= 0) | (probability >= 1), 0, bits).astype(np.float32)


def _finite(probability: np.ndarray) -> np.ndarray:
    """The same: of NaN a threshold would make background."""
    if not is_finite(torch.from_numpy(probability)):
        raise NotFiniteError(
            "has no finite probabilities in the space of its file", "export it with its geometry"
        )
    return probability


def _restored(
    probability: Tensor,
    placement: Placement,
    shape: tuple[int, ...],
    kinds: Sequence[str],
    config: PredictConfig,
    scratch: Scratch,
) -> dict[str, np.ndarray]:
    """Mask, and what was asked for beside it, [X, Y, Z] in the space of the file."""
    types: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mask": lambda p: _finite(p) >= config.threshold,
        "probability": _finite,
        "uncertainty": lambda p: entropy(_finite(p)),
    }
    results = {
        kind: scratch.volume(1, shape, np.uint8 if kind == "mask" else np.float32)[0]
        for kind in kinds
    }
    outputs = [(result, types[kind]) for kind, result in results.items()]
    placement.fill(probability, outputs, scratch.release)
    return results

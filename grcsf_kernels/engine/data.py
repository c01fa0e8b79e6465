# SPDX-License-Identifier: Apache-2.0
"""Cases in folders, and how a volume becomes a tensor and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    Orientation,
    RandFlipd,
    ScaleIntensityRange,
    Spacing,
    Transform,
)
from torch import Tensor

from grcsf_kernels.engine.config import DataConfig
from grcsf_kernels.engine.errors import InputError
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.volumes import (
    Volume,
    is_volume,
    read_label,
    read_residual,
    read_volume,
    stem,
)

_MADE_BY_US = ("_label", "_mask", "_residual", "_probability", "_uncertainty")


@dataclass(frozen=True)
class Case:
    """One subject: its name and its files."""

    name: str
    image: Path
    label: Path | None = None


def find_cases(folder: Path, report: Report, *, labels: bool) -> list[Case]:
    """The cases of a folder, by name.

    Two layouts: ``<case>_image.nii.gz`` with ``<case>_label.nii.gz`` beside it, or
    ``images/<case>.nii.gz`` with ``labels/<case>.nii.gz``. Where labels are not needed, any other
    NIfTI file is an image too.

    Args:
        folder: the folder, or one image.
        report: takes the pairs with a missing half.
        labels: whether each case needs a label.

    Raises:
        InputError: the folder does not exist or holds no case.
    """
    folder = Path(folder)
    if folder.is_file():
        if labels:
            raise InputError(folder, "is a file", "expected a folder of images and labels")
        return [Case(stem(folder).removesuffix("_image"), folder)]
    if not folder.is_dir():
        raise InputError(folder, "does not exist", "check the path")
    if (folder / "images").is_dir():
        images = {stem(p): p for p in folder.glob("images/*") if is_volume(p)}
        found = {stem(p): p for p in folder.glob("labels/*") if is_volume(p)}
    else:
        files = {stem(p): p for p in folder.iterdir() if is_volume(p)}
        images = {n.removesuffix("_image"): p for n, p in files.items() if n.endswith("_image")}
        found = {n.removesuffix("_label"): p for n, p in files.items() if n.endswith("_label")}
        if not images and not labels:
            images = {n: p for n, p in files.items() if not n.endswith(_MADE_BY_US)}
    for name in sorted(found.keys() - images.keys()):
        report.skip(found[name], f"{found[name]}: has no image; add it or remove the label")
    cases = []
    for name, image in sorted(images.items()):
        if labels and name not in found:
            report.skip(image, f"{image}: has no label; add it or remove the image")
            continue
        cases.append(Case(name, image, found.get(name)))
    if not cases:
        wanted = "<case>_image.nii.gz and <case>_label.nii.gz, or images/ and labels/"
        raise InputError(folder, "holds no usable case", f"expected {wanted}")
    return cases


def find_labels(folder: Path, report: Report) -> list[Case]:
    """The cases to measure: those of :func:`find_cases`, or of a folder that holds labels alone.

    Without an image, a label is its own reference for shape and affine.

    Raises:
        InputError: the folder does not exist or holds no label.
    """
    folder = Path(folder)
    files = [p for p in sorted(folder.iterdir()) if is_volume(p)] if folder.is_dir() else []
    apart = (folder / "images").is_dir() or any(stem(p).endswith("_image") for p in files)
    if apart or not files:
        return find_cases(folder, report, labels=True)
    found = [p for p in files if not stem(p).endswith(_MADE_BY_US[1:])]
    if not found:
        raise InputError(folder, "holds no label", "expected <case>_label.nii.gz")
    return [Case(stem(path).removesuffix("_label"), path, path) for path in found]


class Preprocessing:
    """Volume to tensor and back: RAS orientation, spacing, intensities.

    Args:
        config: what to do.

    Raises:
        InputError: an unknown ``intensity``.
    """

    def __init__(self, config: DataConfig) -> None:
        steps: list[Transform] = [Orientation("RAS", labels=None)]
        if config.spacing is not None:
            steps.append(Spacing(config.spacing, align_corners=False, dtype=np.float32))
        # One instance: MONAI undoes an operation only with the transform that did it.
        self._geometry = Compose(steps)
        if config.intensity == "zscore":
            self._intensity: Transform = NormalizeIntensity(nonzero=True)
        elif config.intensity == "window":
            # From 0: volumes are padded with 0, which has to be the least dense value.
            self._intensity = ScaleIntensityRange(*config.window, 0.0, 1.0, clip=True)
        else:
            raise InputError(
                "data.intensity", f"is {config.intensity!r}", "expected zscore or window"
            )

    def image(self, volume: Volume) -> MetaTensor:
        """[1, *S] float32, normalized."""
        return self._intensity(self.place(volume))

    def place(self, volume: Volume) -> MetaTensor:
        """[K, *S] in RAS orientation at the spacing (linear), intensities as they are."""
        array = torch.as_tensor(np.array(volume.array, copy=True))
        channels = array[None] if array.ndim == 3 else array.movedim(-1, 0)
        tensor = MetaTensor(channels.contiguous(), affine=torch.as_tensor(volume.affine))
        return self._geometry(tensor)

    def grid(self, shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        """Size and affine that :meth:`place` gives a volume of a shape and an affine."""
        # One value, seen as a volume: MONAI works out the geometry without touching voxels.
        empty = MetaTensor(torch.zeros(1).expand(1, *shape), affine=torch.as_tensor(affine))
        placed: MetaTensor = empty
        for step in self._geometry.transforms:
            placed = step(placed, lazy=True)
        size = tuple(int(n) for n in placed.peek_pending_shape())
        return size, np.asarray(placed.peek_pending_affine())

    def intensities(self, slabs: Callable[[], Iterable[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The slabs of a placed volume and what :meth:`image` makes of them.

        Args:
            slabs: gives the slabs anew at every call: statistics come before values.
        """
        normalize = self._intensity
        if isinstance(normalize, NormalizeIntensity):
            mean, std = _statistics(slabs)
            normalize = NormalizeIntensity([mean], [std], nonzero=True, channel_wise=True)
        for slab in slabs():
            yield slab, torch.as_tensor(normalize(slab)).as_subclass(Tensor)

    def restore(self, maps: Tensor, placed: MetaTensor) -> np.ndarray:
        """[K, *S] in the space of ``placed`` back to the voxels of its file: [X, Y, Z, K]."""
        tensor = MetaTensor(
            maps.detach().float().cpu(),
            affine=placed.affine,
            applied_operations=list(placed.applied_operations),
        )
        restored = self._geometry.inverse(tensor)
        return np.ascontiguousarray(torch.as_tensor(restored).movedim(0, -1).numpy())


def _statistics(slabs: Callable[[], Iterable[Tensor]]) -> tuple[float, float]:
    """Mean and standard deviation of the values that are not 0; 0 and 1 where there are none."""
    count, total, square = 0, 0.0, 0.0
    for slab in slabs():
        values = slab[slab != 0]
        count, total = count + values.numel(), total + float(values.sum(dtype=torch.float64))
    mean = total / max(count, 1)
    for slab in slabs():
        values = slab[slab != 0].double().sub_(mean)
        square += float(values.dot(values))
    std = (square / max(count, 1)) ** 0.5
    # A constant has no deviation but what rounding leaves, and stays in its units.
    return mean, std if std > 1e-7 * abs(mean) else 1.0


@dataclass
class Sample:
    """A case as tensors.

    Attributes:
        case: which.
        volume: the image's file; its array is given up, to save memory.
        image: [1, *S] float32.
        label: [1, *S] float32 of 0 and 1, or None.
        residual: [K, *S] float32, or None.
    """

    case: Case
    volume: Volume
    image: MetaTensor
    label: Tensor | None = None
    residual: Tensor | None = None


def load_sample(
    case: Case,
    preprocessing: Preprocessing,
    *,
    labels: bool = False,
    residuals: Path | None = None,
) -> Sample:
    """Read and preprocess a case.

    Args:
        case: which.
        preprocessing: how.
        labels: read the label; one without any lesion voxel is refused.
        residuals: a folder of ``<case>_residual.nii.gz``; None: none are read.

    Raises:
        InputError: a file that can't be used.
    """
    volume = read_volume(case.image)
    sample = Sample(case, volume, preprocessing.image(volume))
    if labels:
        assert case.label is not None
        label = read_label(case.label, volume)
        if not label.array.any():
            raise InputError(
                case.label, "is empty", "training needs lesions: leave the case out of training"
            )
        sample.label = (preprocessing.place(label).as_tensor() >= 0.5).float()
        if not sample.label.any():
            raise InputError(
                case.label, "is empty at the spacing in data.spacing", "use a finer spacing"
            )
    if residuals is not None:
        path = Path(residuals) / f"{case.name}_residual.nii.gz"
        if not path.is_file():
            raise InputError(path, "does not exist", "run grcsf residuals on the same data first")
        maps = preprocessing.place(read_residual(path, volume))
        sample.residual = maps.as_tensor()
    volume.array = np.empty((0, 0, 0), np.float32)
    return sample


def mirrors(keys: Sequence[str], axes: Sequence[int]) -> list[Transform]:
    """Random mirroring along each of ``axes``, half of the time.

    Raises:
        InputError: an axis other than 0, 1 and 2.
    """
    if any(axis not in (0, 1, 2) for axis in axes):
        raise InputError("mirror_axes", f"is {tuple(axes)}", "expected axes among 0, 1 and 2")
    return [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]


def check_size(sample: Sample, smallest: Sequence[int], what: str) -> None:
    """InputError where the volume is smaller than ``smallest`` on an axis."""
    space = tuple(sample.image.shape[1:])
    if any(size < least for size, least in zip(space, smallest, strict=True)):
        raise InputError(
            sample.case.image,
            f"has {space} voxels after preprocessing, fewer than {what} {tuple(smallest)}",
            "use a smaller patch or a finer data.spacing",
        )


class Samples:
    """Preprocessed cases. Those that fit are kept in memory, the rest are read again when needed.

    Args:
        load: reads a case; the same case must give the same sample.
        limit: bytes of tensors that are kept.
    """

    def __init__(self, load: Callable[[Case], Sample], limit: float) -> None:
        self._load, self._left = load, limit
        self._cases: list[Case] = []
        self._kept: dict[Case, Sample] = {}

    def add(self, case: Case, sample: Sample) -> None:
        """Take a case that was loaded."""
        tensors = (sample.image, sample.label, sample.residual)
        size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        self._cases.append(case)
        if size <= self._left:
            self._left -= size
            self._kept[case] = sample

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: int) -> Sample:
        case = self._cases[index]
        return self._kept[case] if case in self._kept else self._load(case)

    @property
    def names(self) -> list[str]:
        """Of the cases, in order."""
        return [case.name for case in self._cases]

    def subset(self, indices: Sequence[int]) -> Samples:
        """Some of the cases, with what is kept of them."""
        part = Samples(self._load, 0)
        part._cases = [self._cases[index] for index in indices]
        part._kept = self._kept
        return part

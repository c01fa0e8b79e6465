# SPDX-License-Identifier: Apache-2.0
"""Cases as tensors, read when they are needed.

Where cases are: :mod:`grcsf_kernels.engine.io.datasets`. How a volume becomes a tensor:
:mod:`grcsf_kernels.engine.data.preprocessing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from rich.progress import track
from torch import Tensor

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.data.preprocessing import Preprocessing
from grcsf_kernels.engine.io.datasets import Case, residual_path
from grcsf_kernels.engine.io.nifti import Volume, read_image, read_label, read_residual
from grcsf_kernels.engine.io.sources import obstacle
from grcsf_kernels.engine.report import Report, console


@dataclass
class Sample:
    """A case as tensors.

    Attributes:
        case: which.
        volume: the image's file; its array is given up, to save memory.
        image: [C, *S] float32.
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
    lesion_labels: Sequence[int] | None = None,
) -> Sample:
    """Read and preprocess a case.

    Args:
        case: which.
        preprocessing: how.
        labels: read the label; one without any lesion voxel is refused.
        residuals: a folder of ``<case>_residual.nii.gz``; None: none are read.
        lesion_labels: see :func:`grcsf_kernels.engine.io.nifti.read_label`.

    Raises:
        InputError: a file that can't be used.
    """
    volume = read_image(case.images)
    box = preprocessing.box(volume)
    sample = Sample(case, volume, preprocessing.image(volume, box))
    if labels:
        assert case.label is not None
        label = read_label(case.label, volume, lesion_labels)
        if not label.array.any():
            raise InputError(
                case.label, "is empty", "training needs lesions: leave the case out of training"
            )
        sample.label = preprocessing.label(label, box)
        if not sample.label.any():
            raise InputError(
                case.label,
                "has no lesion in the foreground of its image",
                "set data.crop_foreground to false",
            )
    if residuals is not None:
        path = residual_path(residuals, case)
        if (problem := obstacle(path)) is not None:
            raise InputError(path, problem[0], "run grcsf residuals on the same data first")
        sample.residual = preprocessing.place(read_residual(path, volume), box).as_tensor()
    volume.array = np.empty((0, 0, 0), np.float32)
    return sample


def check_size(sample: Sample, smallest: Sequence[int], what: str) -> None:
    """InputError where the volume is smaller than ``smallest`` on an axis."""
    space = tuple(sample.image.shape[1:])
    if any(size < least for size, least in zip(space, smallest, strict=True)):
        raise InputError(
            sample.case.image,
            f"has {space} voxels after preprocessing, fewer than {what} {tuple(smallest)}",
            "use a smaller patch or a finer data.spacing",
        )


def read_samples(
    cases: Sequence[Case],
    load: Callable[[Case], Sample],
    limit: float,
    report: Report,
    maps: int | None = None,
) -> Samples:
    """The cases that can be read and are of one kind: as many channels and residual maps.

    Which number that is, most cases decide, not the first; of equally frequent numbers the one that
    comes first. The others are reported.

    Args:
        cases: those to read.
        load: reads and preprocesses a case.
        limit: see :class:`Samples`.
        report: takes the cases that can't be used.
        maps: the number of residual maps, where it is known; None: as for channels.
    """
    samples = Samples(load, limit)
    kinds: dict[Case, tuple[int, int]] = {}
    for case in track(cases, "reading", console=console, disable=console.quiet):
        try:
            sample = load(case)
        except InputError as error:
            report.skip(case.image, str(error))
            continue
        found = 0 if sample.residual is None else sample.residual.shape[0]
        kinds[case] = (sample.image.shape[0], found)
        samples.add(case, sample)
    usual = _most(channels for channels, _ in kinds.values())
    maps = _most(found for _, found in kinds.values()) if maps is None else maps
    for case, (channels, found) in kinds.items():
        if channels != usual:
            problem = f"has {channels} channel(s), and the others have {usual}"
            remedy = "name images with the same channels in the same order"
        elif found != maps:
            problem = f"has {found} residual maps, and the others have {maps}"
            remedy = "run grcsf residuals on all cases again"
        else:
            continue
        samples.remove(case)
        report.skip(case.image, f"{case.image}: {problem}; {remedy}")
    return samples


def _most(numbers: Iterable[int]) -> int:
    """The most frequent one; 0 of none."""
    ranked = Counter(numbers).most_common(1)
    return ranked[0][0] if ranked else 0


def check_channels(sample: Sample, expected: int, what: str) -> None:
    """InputError where the image has another number of channels than ``what`` takes."""
    found = sample.image.shape[0]
    if found != expected:
        raise InputError(
            sample.case.image,
            f"has {found} channel(s), and {what} {expected}",
            "name images with the same channels in the same order",
        )


def _size(sample: Sample) -> int:
    """Bytes of its tensors."""
    tensors = (sample.image, sample.label, sample.residual)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Samples:
    """Preprocessed cases. Those that fit are kept in memory, the rest are read again when needed.

    Args:
        load: reads a case; the same case must give the same sample.
        limit: bytes of tensors that are kept.
    """

    def __init__(self, load: Callable[[Case], Sample], limit: float) -> None:
        self._load, self._left = load, limit
        self.cases: list[Case] = []
        self._kept: dict[Case, Sample] = {}

    def add(self, case: Case, sample: Sample) -> None:
        """Take a case that was loaded."""
        size = _size(sample)
        self.cases.append(case)
        if size <= self._left:
            self._left -= size
            self._kept[case] = sample

    def remove(self, case: Case) -> None:
        """Leave a case out again, and give up its memory."""
        self.cases.remove(case)
        sample = self._kept.pop(case, None)
        if sample is not None:
            self._left += _size(sample)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        case = self.cases[index]
        return self._kept[case] if case in self._kept else self._load(case)

    @property
    def names(self) -> list[str]:
        """Of the cases, in order."""
        return [case.name for case in self.cases]

    def subset(self, indices: Sequence[int]) -> Samples:
        """Some of the cases, with what is kept of them."""
        part = Samples(self._load, 0)
        part.cases = [self.cases[index] for index in indices]
        part._kept = self._kept
        return part

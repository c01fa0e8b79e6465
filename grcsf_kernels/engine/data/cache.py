# SPDX-License-Identifier: Apache-2.0
"""Preprocessed cases on disk: read once, mapped into memory from then on."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grcsf_kernels.common.atomic_files import saving, write_whole
from grcsf_kernels.common.errors import InputError, printable
from grcsf_kernels.engine.data.samples import Sample
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.nifti import read_geometry
from grcsf_kernels.engine.report import warn

_FORMAT = 1  # raised whenever preprocessing gives other numbers for the same settings
_TENSORS = ("image", "label", "residual")


class CachedCases:
    """Reads cases through a folder of ``<key>.safetensors``.

    The key is a hash of the settings and of path, size and time of every file of a case, so a
    file or setting that changes gives a new entry. An entry that is damaged is made again. What is
    in an entry is mapped into memory: a crop reads only its own part of the disk.

    A sample from an entry can be cropped and trained on, but not be written in its file's space:
    :meth:`grcsf_kernels.engine.data.preprocessing.Preprocessing.restore` refuses it.

    Args:
        load: reads and preprocesses a case.
        folder: of the entries; made when needed.
        settings: what decides the result, in plain types.
        residuals: gives the residual map of a case, or None.
    """

    def __init__(
        self,
        load: Callable[[Case], Sample],
        folder: Path,
        settings: Any,
        residuals: Callable[[Case], Path] | None = None,
    ) -> None:
        self._load, self._folder = load, Path(folder)
        self._settings, self._residuals = settings, residuals
        self._checked: set[Path] = set()
        self._full = False

    def __call__(self, case: Case) -> Sample:
        """The case, from its entry if that is sound, else read and written there."""
        path = self.path(case)
        sample = self._read(path, case)
        if sample is None:
            made = self._load(case)
            try:
                with saving(path):
                    write_whole(path, lambda temporary: _write(temporary, made))
            except InputError as error:  # the case is good all the same
                if not self._full:
                    warn(f"{error.where}: {error.problem}; such cases are read again instead")
                self._full = True
                return made
            sample = self._read(path, case)
        return made if sample is None else sample

    def path(self, case: Case) -> Path:
        """The entry of a case as its files are now."""
        files = [*case.images, *([case.label] if case.label is not None else [])]
        if self._residuals is not None:
            files.append(self._residuals(case))
        facts = []
        for file in files:
            # One that is missing is for the reader to complain about.
            facts.append([str(file.absolute())])
            if os.path.isfile(file):
                status = file.stat()
                facts[-1] += [str(status.st_size), str(status.st_mtime_ns)]
        key = json.dumps([_FORMAT, self._settings, case.name, facts])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, path: Path, case: Case) -> Sample | None:
        """The entry, or None where there is none or it is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            affine = torch.tensor(json.loads(metadata["affine"]), dtype=torch.float64)
            # The checksum once for each run: it reads all of the entry.
            if path not in self._checked and _checksum(tensors) != metadata["checksum"]:
                return None
        except Exception:  # whatever the reader makes of damaged bytes: it is made again
            return None
        self._checked.add(path)
        return Sample(
            case,
            read_geometry(case.image),
            MetaTensor(tensors["image"], affine=affine),
            tensors.get("label"),
            tensors.get("residual"),
        )


def _write(path: Path, sample: Sample) -> None:
    tensors: dict[str, Tensor] = {}
    for name in _TENSORS:
        value = getattr(sample, name)
        if value is not None:
            tensors[name] = torch.as_tensor(value).as_subclass(Tensor).contiguous()
    metadata = {
        "case": printable(sample.case.name),
        "affine": json.dumps(torch.as_tensor(sample.image.affine).tolist()),
        "checksum": _checksum(tensors),
    }
    save_file(tensors, path, metadata=metadata)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().reshape(-1).view("uint8").data, total)
    return str(total)

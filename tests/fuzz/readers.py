# SPDX-License-Identifier: Apache-2.0
"""Damaged files and folders for everything that reads what a user has.

A case is one file or folder, made from its number. What reads it either refuses it with an
InputError of one line that names it, or gives the value that nibabel gives; it takes bounded time
and memory, and leaves no file and no descriptor behind.
"""

from __future__ import annotations

import gc
import gzip
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from engine.conftest import make_model, train_config
from fuzz.trees import check_tree

from grcsf_kernels import engine
from grcsf_kernels.common.errors import printable
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.config import dump_config
from grcsf_kernels.engine.data.splits import split
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.io.nifti import (
    Volume,
    read_description,
    read_geometry,
    read_image,
    read_label,
    read_residual,
    read_volume,
)
from grcsf_kernels.engine.io.sources import read_json, read_list
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.report import console
from grcsf_kernels.engine.training.state import load_state

_MEMORY = 1 << 30  # bytes that reading a file of kilobytes may claim
_SECONDS = 30
_TYPES = ("u1", "i2", "i4", "f4", "f8", "u2", "i8")
_ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 127, 255, 32767, -32768, 2**31 - 1, -(2**31), 9999)
_ODD_FLOATS = (0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, 352.0, 353.0, 1e9)


class Hang(BaseException):
    """Reading takes too long. No Exception: guards would take it for a fault of the file."""


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Within, memory and time are limited; files and descriptors are as many as before."""

    def late(*_: object) -> None:
        raise Hang

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, files, quiet = descriptors(), sorted(folder.rglob("*")), console.quiet
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    claim = pages * resource.getpagesize() + _MEMORY
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (claim, limits[1]))
    console.quiet = True
    try:
        yield
    except Hang:
        raise AssertionError(f"reading took more than {_SECONDS} s") from None
    finally:
        console.quiet = quiet
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert sorted(folder.rglob("*")) == files, "reading left a file behind"
    if descriptors() > before:
        gc.collect()
        assert descriptors() <= before, "reading left a file open"


def outcome(path: Path, read: Callable[[], Any]) -> Any:
    """What reading gives; None where it was refused, in one line that names the file."""
    try:
        return read()
    except InputError as error:
        line = str(error)
        assert line.isprintable(), line
        assert printable(path) in line and ";" in line, line
        assert "needs more memory" not in line and "has no scratch" not in line, line
        return None


def damage(rng: np.random.Generator, content: bytes, header: int = 0) -> bytes:
    """Bytes with something wrong: flipped, missing, doubled, added; often in the header."""
    made = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        length = max(len(made), 1)
        place = int(rng.integers(min(header, length) if header and rng.random() < 0.7 else length))
        kind = rng.integers(7)
        if kind == 0 and made:
            made[place % len(made)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            made[place : place + 4] = rng.bytes(4)
        elif kind == 2:
            made = made[:place]
        elif kind == 3:
            made[place:place] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 4:
            made[place : place + int(rng.integers(1, 64))] = b""
        elif kind == 5:
            made += rng.bytes(int(rng.integers(1, 10_000)))
        else:
            made[place : place + 16] = bytes([int(rng.choice([0, 255, 32, 10]))]) * 16
    return bytes(made)


def nifti(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A file that is mostly sound, with one or several fields of its header changed."""
    shape = [int(n) for n in rng.integers(1, 9, size=int(rng.choice([2, 3, 3, 3, 4, 4, 5])))]
    dtype = np.dtype(str(rng.choice(_TYPES))).newbyteorder(str(rng.choice(["<", ">"])))
    array = rng.integers(0, 2, size=shape).astype(dtype)
    if rng.random() < 0.3:
        array = (array * np.asarray(0.5 + rng.random(), dtype)).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 3, 3)
    kind = nib.Nifti1Image if rng.random() < 0.7 else nib.Nifti2Image
    order = "<" if rng.random() < 0.8 else ">"
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(array, affine, header)
    image.header.set_xyzt_units(str(rng.choice(["mm", "meter", "micron", "unknown"])))
    if rng.random() < 0.2:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", rng.bytes(20)))
    content = bytearray(image.to_bytes())
    fields = image.header_class.template_dtype.newbyteorder(image.header.endianness)
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3]))):
        name = str(rng.choice(fields.names))
        field, place = fields.fields[name][:2]
        base = field.base
        item = int(rng.integers(max(1, field.itemsize // base.itemsize)))
        if base.kind in "iu":
            info = np.iinfo(base)
            value = np.clip(int(rng.choice(_ODD_NUMBERS)), info.min, info.max)
        elif base.kind == "f":
            value = rng.choice(_ODD_FLOATS)
        else:
            value = rng.bytes(base.itemsize)
        with np.errstate(all="ignore"):
            changed = np.asarray(value).astype(base).tobytes()
        begin = place + item * base.itemsize
        content[begin : begin + base.itemsize] = changed
    return bytes(content), array


def check_value(path: Path, volume: Volume) -> None:
    """What was accepted is what nibabel reads, in millimeters."""
    assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
    try:
        image = nib.load(path)
        expected = np.asarray(image.dataobj)
    except Exception:
        # Only what nibabel refuses and this library corrects.
        assert volume.header["sform_code"] == 0 and volume.header["qform_code"] != 0, path
        return
    with np.errstate(all="ignore"):
        values = expected.astype(np.float32).reshape(volume.array.shape)
    assert np.array_equal(values, volume.array), "other voxels than nibabel reads"
    scale = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    moved = image.affine.copy()
    moved[:3] *= scale
    assert np.allclose(moved, volume.affine, rtol=1e-6), "another geometry than nibabel reads"


def check_volume(rng: np.random.Generator, folder: Path) -> str:
    content, _ = nifti(rng)
    kind = str(rng.choice(["header", "bytes", "packed", "name"], p=[0.6, 0.2, 0.15, 0.05]))
    if kind == "bytes":
        content = damage(rng, content, 352)
    packed = rng.random() < 0.5
    stored = gzip.compress(content, 1, mtime=0) if packed else content
    if kind == "packed":
        stored = damage(rng, stored)
    if kind == "name":
        packed = not packed
    name = "a" + (".nii.gz" if packed else ".nii")
    path = folder / (name.upper() if rng.random() < 0.1 else name)
    path.write_bytes(stored)
    found = 0
    with bounded(folder):
        volume = outcome(path, lambda: read_volume(path))
        if volume is not None:
            found += 1
            check_value(path, volume)
            image = Volume(volume.array, volume.affine, volume.header, folder / "other.nii")
            label = outcome(path, lambda: read_label(path, image))
            assert label is None or set(np.unique(label.array)) <= {0, 1}
            merged = outcome(path, lambda: read_label(path, image, (1, 2)))
            assert merged is None or set(np.unique(merged.array)) <= {0, 1}
            both = outcome(path, lambda: read_image([path, path]))
            assert both is not None and both.array.shape == (*volume.array.shape, 2)
            del label, merged, both, image
        like = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4), None, folder / "other.nii")
        maps = outcome(path, lambda: read_residual(path, like))
        assert maps is None or maps.array.ndim == 4
        geometry = outcome(path, lambda: read_geometry(path))
        assert geometry is not None or volume is None
        description = read_description(path)
        assert description is None or geometry is not None
        del volume, maps, geometry
    return f"{kind} {'read' if found else 'refused'}"


@cache
def _model() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make_model(Path(folder) / "model.safetensors").read_bytes()


_TEXTS: dict[str, Callable[[], bytes]] = {
    "list": lambda: b"a_image.nii.gz\n/b.nii.gz\r\n\xc3\xbc.nii\n",
    "splits": lambda: b'[{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a"]}]',
    "json": lambda: b'{"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}}',
    "config": lambda: dump_config(train_config()).encode(),
    "model": _model,
    "state": _model,
}
_TOKENS = (b"[", b"]", b"{", b"}", b'"', b",", b"null", b"1e999", b"-", b": ", b"&a ", b"*a", b"!!")


def check_text(rng: np.random.Generator, folder: Path) -> str:
    kind = str(rng.choice(list(_TEXTS)))
    content = _TEXTS[kind]()
    if kind not in ("model", "state") and rng.random() < 0.5:
        place = int(rng.integers(len(content) + 1))
        token = _TOKENS[int(rng.integers(len(_TOKENS)))] * int(rng.choice([1, 1, 2, 50_000]))
        content = content[:place] + token + content[place + int(rng.integers(4)) :]
    else:
        content = damage(rng, content, 4000)
    path = folder / {"list": "a.txt", "config": "a.yaml"}.get(kind, f"a.{kind}")
    path.write_bytes(content)
    cases = [Case(name, folder / name) for name in "abc"]
    settings = train_config()
    settings.splits_file = str(path)
    readers: dict[str, Callable[[], Any]] = {
        "list": lambda: read_list(path),
        "splits": lambda: split(cases, settings),
        "json": lambda: read_json(path, "JSON"),
        "config": lambda: engine.load_config(engine.TrainConfig, path),
        "model": lambda: load_checkpoint(path, "GRCSF"),
        "state": lambda: load_state(path, ""),
    }
    with bounded(folder):
        found = outcome(path, readers[kind])
    return f"{kind} {'refused' if found is None else 'read'}"


def check(case: int) -> str:
    """Make the case of this number and read it; AssertionError where something is wrong."""
    rng = np.random.default_rng(case)
    with tempfile.TemporaryDirectory(prefix="grcsf-fuzz-") as name:
        folder = Path(name)
        kind = rng.choice(["volume", "tree", "text"], p=[0.5, 0.3, 0.2])
        if kind == "tree":
            return check_tree(rng, folder, lambda: bounded(folder))
        return (check_volume if kind == "volume" else check_text)(rng, folder)

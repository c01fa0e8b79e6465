# SPDX-License-Identifier: Apache-2.0
"""``grcsf doctor``: what this installation can do, and in words why something is missing.

Needs nothing but the core package, so that it runs where little else does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable

import torch

from grcsf_kernels import native
from grcsf_kernels._version import __version__
from grcsf_kernels.common.errors import one_line
from grcsf_kernels.dispatch import BACKENDS, OPERATORS, automatic, why_not

_OLDEST_TORCH = (2, 6)
_REBUILD = (
    "remedy: with a C++ compiler on the path, "
    "pip install --force-reinstall --no-deps . in a checkout"
)

_EXTRAS = {
    "triton": ("triton",),
    "train": (
        "monai",
        "nibabel",
        "lightning-fabric",
        "typer",
        "rich",
        "matplotlib",
        "tensorboard",
        "safetensors",
        "scipy",
        "pyyaml",
    ),
    "demo": ("nilearn",),
}


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _guarded(part: Callable[[], list[str]], name: str) -> list[str]:
    """The lines of a part of the report; of one that fails, what it raised."""
    try:
        return part()
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [f"{name:<10} can't be looked at: {problem}"]


def _torch_lines() -> list[str]:
    lines = [
        f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"{torch.cuda.device_count()} device(s)"
    ]
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        lines.append(f"           too old: pip install 'torch>={oldest}'")
    return lines


def _native_lines() -> list[str]:
    reason = native.why_not("cpu")
    if reason:
        return [f"_C         missing: {reason}", f"           {_REBUILD}"]
    module = native.library()
    openmp = module.openmp_library() or "none found: kernels run on one thread"
    lines = [
        f"_C         built, instruction set {module.isa()}",
        f"threads    {torch.get_num_threads()}, in torch's own pool ({openmp})",
    ]
    info = module.cuda_info()
    if info is None:
        lines.append(f"CUDA       {native.why_not('cuda')}")
        return lines
    runtime = f"{info['runtime'] // 1000}.{info['runtime'] % 1000 // 10}"
    lines.append(f"CUDA       built with {runtime} for {info['architectures']}")
    for name, major, minor in info["devices"]:
        lines.append(f"           {name}, compute capability {major}.{minor}")
    if info["problem"]:
        lines.append(f"           no device can be used: {info['problem']}")
    return lines


def _backend_lines() -> list[str]:
    lines = []
    for name in BACKENDS:
        try:
            reason = why_not(name)
            runs = [operator for operator in OPERATORS if not why_not(name, operator)]
            what = f"not available: {reason}" if reason else ", ".join(runs)
        except Exception as error:  # the others are still worth a line
            what = f"not available: {type(error).__name__}: {one_line(error, 300)}"
        lines.append(f"  {name:<10} {what}")
    return lines


def _choice_lines() -> list[str]:
    lines = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("  cuda       no CUDA device")
            continue
        for operator in OPERATORS:
            chosen, reasons = automatic(operator, device)
            why = f"  ({'; '.join(reasons)})" if chosen == "reference" and reasons else ""
            lines.append(f"  {device:<10} {operator:<14} {chosen}{why}")
    return lines


def _variable_lines() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith("GRCSF_"))
    return [f"  {name}={os.environ[name]!r}" for name in names] or ["  none"]


def _extra_lines() -> list[str]:
    lines = []
    for extra, distributions in _EXTRAS.items():
        missing = [name for name in distributions if not _installed(name)]
        remedy = f'missing {", ".join(missing)}: pip install "grcsf-kernels[{extra}]"'
        lines.append(f"  {extra:<10} {remedy if missing else 'complete'}")
    return lines


def report() -> str:
    """The report that ``grcsf doctor`` prints. A part that is broken says so; the others stay."""
    lines = [
        f"grcsf-kernels {__version__}",
        f"Python     {platform.python_version()} on {platform.platform()}",
        *_guarded(_torch_lines, "torch"),
        *_guarded(_native_lines, "_C"),
    ]
    for title, part in (
        ("Backends", _backend_lines),
        ("Which backend runs what", _choice_lines),
        ("Environment variables", _variable_lines),
        ("Extras", _extra_lines),
    ):
        lines += ["", title, *_guarded(part, "  this")]
    return "\n".join(lines)


def main() -> int:
    """Print the report. The exit status is 0: something that is missing is no error."""
    sys.stdout.write(report() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

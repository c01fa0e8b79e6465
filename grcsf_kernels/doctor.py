# SPDX-License-Identifier: Apache-2.0
"""``grcsf doctor``: what this installation can do, and in words why something is missing.

Needs nothing but the core package, so that it runs where little else does.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from grcsf_kernels import native
from grcsf_kernels._version import __version__
from grcsf_kernels.dispatch import OPERATORS, automatic, backends

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


def _native_lines() -> list[str]:
    reason = native.why_not("cpu")
    if reason:
        return [f"_C         missing: {reason}"]
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


def report() -> str:
    """The report that ``grcsf doctor`` prints."""
    lines = [
        f"grcsf-kernels {__version__}",
        f"Python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"{torch.cuda.device_count()} device(s)",
        *_native_lines(),
        "",
        "Backends",
    ]
    for name, status in backends().items():
        what = ", ".join(status.operators) if status else f"not available: {status.reason}"
        lines.append(f"  {name:<10} {what}")
    lines += ["", "Which backend runs what"]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("  cuda       no CUDA device")
            continue
        for operator in OPERATORS:
            chosen, _ = automatic(operator, device)
            lines.append(f"  {device:<10} {operator:<14} {chosen}")
    lines += ["", "Extras"]
    for extra, distributions in _EXTRAS.items():
        missing = [name for name in distributions if not _installed(name)]
        remedy = f'missing {", ".join(missing)}: pip install "grcsf-kernels[{extra}]"'
        lines.append(f"  {extra:<10} {remedy if missing else 'complete'}")
    return "\n".join(lines)


def main() -> int:
    """Print the report. The exit status is 0: something that is missing is no error."""
    sys.stdout.write(report() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""The package as an index would give it: ``make wheel`` and ``make wheel-check``.

*build*: the checkout's files in a folder whose name has spaces and brackets; ``python -m
build`` makes an sdist of them and a wheel of the sdist, with kernels, in environments of its own.

*check*: the wheel in an environment that has nothing else but torch and pytest, no Triton for
instance, and there the operators' tests that came with the sdist.

Needs nothing but Python and git.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/wheel"
CHECKOUT = WORK / "a (folder) with [brackets] & spaces/checkout"
DIST = WORK / "dist"

INSTALLED = """
import json, pathlib, sys
import torch
from grcsf_kernels import backends, native
path = pathlib.Path(native.library().__file__)
assert path.is_relative_to(sys.prefix), f"{path} is not the wheel's"
info = json.loads((path.parent / "_build_info.json").read_text())
assert info["native"] == "" and backends()["cpu"], (info, backends())
print(f"{path.name} runs on {native.library().isa()}; CUDA: {info['cuda'] or 'built'}")
"""


def run(*command: str, folder: Path = WORK, **environment: str) -> None:
    """Run a step; the first that fails ends everything."""
    result = subprocess.run(command, cwd=folder, env=os.environ | environment, check=False)
    if result.returncode:
        raise SystemExit(f"failed ({result.returncode}): {' '.join(command)}")


def environment(name: str, *packages: str) -> str:
    """The Python of a new environment with these packages."""
    folder = WORK / name
    venv.create(folder, clear=True, with_pip=True)
    python = str(folder / "bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def unpack(folder: Path) -> Path:
    """The sdist's files, in a folder of their own in ``folder``."""
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        opened.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def build() -> None:
    """The sdist of the checkout's files, and the wheel of the sdist, in ``DIST``."""
    shutil.rmtree(WORK, ignore_errors=True)
    CHECKOUT.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (CHECKOUT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, CHECKOUT / name)
    python = environment("tools", "build")
    run(python, "-m", "build", "--sdist", "--outdir", str(DIST), str(CHECKOUT))
    tree = unpack(CHECKOUT.parent)
    # Sources and a compiler are there: a wheel without kernels would be a failure.
    wheel = ["--wheel", "--outdir", str(DIST), str(tree)]
    run(python, "-m", "build", *wheel, GRCSF_BUILD_CPU="1")


def check(torch: str) -> None:
    """The operators' tests of the sdist on the wheel, apart from the checkout."""
    (wheel,) = DIST.glob("*.whl")
    assert "none-any" not in wheel.name, f"{wheel.name} has no kernels"
    python = environment("empty", torch)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, str(wheel), "pytest>=8", "hypothesis>=6.100")
    tests = unpack(WORK) / "tests/ops"
    run(python, "-c", INSTALLED, PYTHONPATH="")
    operators = [str(tests / f"test_{name}.py") for name in ("residual_map", "gcu", "rcu")]
    pytest = [python, "-m", "pytest", "-q", "-k", "cpu-cpu", "-p", "no:cacheprovider"]
    run(*pytest, *operators, PYTHONPATH="", PYTHONSAFEPATH="1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("build", "check"))
    parser.add_argument("--torch", default="torch", help="what pip is to install first")
    options = parser.parse_args()
    if options.step == "build":
        build()
    else:
        check(options.torch)

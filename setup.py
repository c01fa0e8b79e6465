# SPDX-License-Identifier: Apache-2.0
"""Drives CMake to build ``grcsf_kernels._C``, without torch.

GRCSF_BUILD_CPU=auto|1|0   auto: without a working compiler the package installs as pure Python
GRCSF_BUILD_CUDA=auto|1|0  auto: csrc/cuda is built where nvcc is found
CMAKE_ARGS                 more arguments for CMake

What was built, and why something was not, goes to ``_build_info.json`` in the package, where
``grcsf doctor`` and ``grcsf_kernels.backends()`` read it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> str:
    """The value of a build switch: auto, 1 or 0."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} is {value!r}, expected auto, 1 or 0")
    return value


class BuildFailed(Exception):
    """A step of the native build failed; the message is its last lines."""


class CMakeBuild(build_ext):
    """Builds the one extension with CMake; falls back to pure Python where it may."""

    def build_extension(self, ext: Extension) -> None:
        wanted = switch("GRCSF_BUILD_CPU")
        info = {"native": "", "cuda": ""}
        target = ROOT / "grcsf_kernels" if self.editable_mode or self.inplace else None
        target = target or Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        if wanted == "0":
            info["native"] = "switched off by GRCSF_BUILD_CPU=0 when the package was built"
        else:
            try:
                info["cuda"] = self._cmake(ext)
            except BuildFailed as failure:
                if wanted == "1" or switch("GRCSF_BUILD_CUDA") == "1":
                    raise SystemExit(f"building grcsf_kernels._C failed: {failure}") from failure
                info["native"] = f"the native build failed when the package was built: {failure}"
                print(f"warning: installing without native kernels: {failure}", file=sys.stderr)
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def _cmake(self, ext: Extension) -> str:
        """Configure, build and copy; the reason why CUDA was not built, or an empty string."""
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise BuildFailed("cmake was not found")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        log = run(
            [
                cmake,
                *("-S", str(ROOT), "-B", str(build)),
                *ninja,
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DGRCSF_BUILD_CUDA={switch('GRCSF_BUILD_CUDA')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )
        run([cmake, "--build", str(build), "--config", "Release"])
        built = build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, output)
        found = re.search(r"GRCSF_CUDA: (.*)", log)
        reason = found.group(1).strip() if found else "unknown"
        return "" if reason == "built" else reason


def run(command: list[str]) -> str:
    """Run a build step and return what it printed; BuildFailed with the telling lines."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        cause = r"could not find|could be found|error:|not able to compile|no such file"
        telling = [line for line in lines if re.search(cause, line, re.I)]
        raise BuildFailed(" | ".join((telling or lines[-3:])[:3]))
    return result.stdout


setup(
    ext_modules=[Extension("grcsf_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)

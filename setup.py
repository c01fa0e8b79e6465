# SPDX-License-Identifier: Apache-2.0
"""Drives CMake to build ``grcsf_kernels._C``, without torch.

GRCSF_BUILD_CPU=auto|1|0   auto: without a C++ compiler the package is built as pure Python
GRCSF_BUILD_CUDA=auto|1|0  auto: csrc/cuda is built where nvcc and a GPU are found
GRCSF_BUILD_FROM=WHEEL     the kernels of a wheel of this version, instead of compiling them again
CMAKE_ARGS                 more arguments for CMake

Whatever else goes wrong ends the build: a compiler that is there and fails must not leave a package
that is quietly slow. What was built, and why something was not, goes to ``_build_info.json`` in the
package, where ``grcsf doctor`` and ``grcsf_kernels.backends()`` read it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # only where the build is not isolated: pyproject.toml asks for a newer one
    raise SystemExit("setuptools is too old: pip install 'setuptools>=77'") from None

ROOT = Path(__file__).resolve().parent
WITHOUT = "to install without native kernels, set GRCSF_BUILD_CPU=0"
# The names that CMake looks for where CXX names no compiler.
COMPILERS = ("c++", "g++", "clang++", "icpx")


def switch(name: str) -> str:
    """The value of a build switch: auto, 1 or 0."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} is {value!r}, expected auto, 1 or 0")
    return value


def failed(reason: str, remedy: str = WITHOUT) -> SystemExit:
    """What ends the build: the reason, and what to do."""
    return SystemExit(f"building grcsf_kernels._C failed: {reason}; {remedy}")


def compiler_is_missing() -> bool:
    """Whether no compiler was named and none is on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]) is None:
        raise failed(f"CXX names {named[0]}, which is not there", "correct CXX or unset it")
    if named or "CMAKE_CXX_COMPILER" in os.environ.get("CMAKE_ARGS", ""):
        return False
    return not any(shutil.which(name) for name in COMPILERS)


class CMakeBuild(build_ext):
    """Builds the one extension with CMake, or none where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        wanted, cuda = switch("GRCSF_BUILD_CPU"), switch("GRCSF_BUILD_CUDA")
        info = {"native": "", "cuda": ""}
        if wheel := os.environ.get("GRCSF_BUILD_FROM"):
            info = self._unpack(ext, wheel)
        elif wanted == "0":
            if cuda == "1":
                raise failed("GRCSF_BUILD_CPU=0 and GRCSF_BUILD_CUDA=1", "csrc/cuda needs both")
            info["native"] = "switched off by GRCSF_BUILD_CPU=0 when the package was built"
        elif not (ROOT / "csrc/cpu").is_dir() or not (ROOT / "python").is_dir():
            raise failed(f"the sources csrc/ and python/ are missing from {ROOT}")
        elif compiler_is_missing():
            reason = f"no C++ compiler was found ({', '.join(COMPILERS)})"
            if wanted == "1" or cuda == "1":
                raise failed(reason, "install one, g++ say")
            info["native"] = f"{reason} when the package was built"
            print(f"warning: building without native kernels: {reason}", file=sys.stderr)
        else:
            info["cuda"] = self._cmake(ext)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        if self.editable_mode or self.inplace:
            target = ROOT / "grcsf_kernels"
            if info["native"]:  # an older one would be loaded
                (target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        self.distribution.grcsf_pure = bool(info["native"])

    def _unpack(self, ext: Extension, wheel: str) -> dict[str, str]:
        """Take ``_C`` out of a wheel; what that one's build said."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            with zipfile.ZipFile(wheel) as opened:
                kernels = opened.read(f"grcsf_kernels/{output.name}")
                info = json.loads(opened.read("grcsf_kernels/_build_info.json"))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            remedy = "name a wheel with kernels for this Python, or unset it"
            raise failed(f"GRCSF_BUILD_FROM={wheel}: {error}", remedy) from error
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        output.write_bytes(kernels)
        return info

    def _cmake(self, ext: Extension) -> str:
        """Configure, build and copy; the reason why CUDA was not built, or an empty string."""
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise failed("cmake was not found", f"install it (pip install cmake), or {WITHOUT}")
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build)),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRCSF_BUILD_CUDA={switch('GRCSF_BUILD_CUDA')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build.parent.mkdir(parents=True, exist_ok=True)
        # Another build of the same checkout may be under way. Closed, the file is let go.
        self.lock = (build.parent / "cmake.lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        # CMake keeps the compiler that a folder began with, whatever is asked for.
        before = build / "configured_with.json"
        asked = json.dumps([configure, os.environ.get("CXX"), os.environ.get("CXXFLAGS")])
        if build.exists() and not (before.is_file() and before.read_text() == asked):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        before.write_text(asked)
        log = run(configure)
        cores = str(os.cpu_count() or 1)
        run([cmake, "--build", str(build), "--config", "Release", "--parallel", cores])
        built = build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old one loaded keeps it.
        output.unlink(missing_ok=True)
        shutil.copy2(built, output)
        self.lock.close()
        found = re.search(r"GRCSF_CUDA: (.*)", log)
        reason = found.group(1).strip() if found else "unknown"
        return "" if reason == "built" else reason


class Wheel(bdist_wheel):
    """A wheel without ``_C`` is for every Python and platform."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and self.distribution.grcsf_pure:
            self.distribution.ext_modules = None
            self.root_is_pure = True


def run(command: list[str]) -> str:
    """Run a build step and return what it printed; one that fails ends the build."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(result.stdout, flush=True)
    if result.returncode:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        cause = r"could not find|could be found|error:|not able to compile|no such file|no space"
        telling = [line for line in lines if re.search(cause, line, re.I)]
        remedy = f"pip -v shows all that was printed; {WITHOUT}"
        if "enable_language" in result.stdout or "nvcc" in result.stdout:
            remedy += ", without csrc/cuda GRCSF_BUILD_CUDA=0"
        raise failed(" | ".join((telling or lines[-3:])[:3]), remedy)
    return result.stdout


setup(
    # Optional: nothing is copied beside the sources where there is none.
    ext_modules=[Extension("grcsf_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)

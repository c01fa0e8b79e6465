# SPDX-License-Identifier: Apache-2.0
"""What is built where: without a compiler, with a broken one, and with nothing but the sdist.

``tests/wheel.py`` (``make wheel``) compiles the kernels from an sdist and tests them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("python3", "cmake", "ninja", "make", "uname")


def run(command: list[str], folder: Path = ROOT, **environment: str):
    """Run a step; its output goes to ``stdout`` of the result."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"GRCSF_BUILD_CUDA": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return run(command, **environment)


def info(folder: Path) -> dict[str, str]:
    return json.loads((folder / "lib/grcsf_kernels/_build_info.json").read_text())


def hook(tree: Path, what: str, out: Path, **environment: str) -> Path:
    """What an installer calls in a source tree; the one file that it made."""
    out.mkdir(parents=True, exist_ok=True)
    call = f"from setuptools import build_meta as b; b.build_{what}({str(out)!r})"
    result = run([sys.executable, "-c", call], tree, **environment)
    assert result.returncode == 0, result.stdout
    (made,) = (path for path in out.iterdir() if path.is_file())
    return made


def tracked() -> list[str]:
    """The files of the checkout."""
    listed = run(["git", "ls-files", "-z"])
    if listed.returncode:
        pytest.skip("not in a git checkout: there is nothing to compare with")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def copy(names: list[str], tree: Path) -> Path:
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, of the tracked files, built and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = hook(copy(tracked(), folder / "checkout"), "sdist", folder / "dist")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def no_compiler(tmp_path) -> str:
    """A PATH with all that a build needs but a compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def test_the_sdist_has_every_tracked_file(sdist):
    made = {"PKG-INFO", "setup.cfg"}
    found = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()} - made
    assert {name for name in found if ".egg-info/" not in name} == set(tracked())


def test_an_sdist_without_kernel_sources_is_refused(sdist, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree", ignore=shutil.ignore_patterns("csrc"))
    result = run([sys.executable, "setup.py", "build_ext"], tree)
    assert result.returncode != 0
    assert "the sources csrc/ and python/ are missing" in result.stdout


def test_a_wheel_without_kernels_is_for_every_platform_and_says_why(sdist, tmp_path, no_compiler):
    tree = shutil.copytree(sdist, tmp_path / "a (b) [c] & 'd'")
    wheel = hook(tree, "wheel", tmp_path / "dist", PATH=no_compiler, CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (metadata,) = (name for name in names if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: true" in opened.read(metadata).decode()
        opened.extractall(tmp_path / "installed")
    assert not [name for name in names if "_C." in name]
    # The first use says it, since pip shows nothing of a build that succeeded.
    use = (
        # Where the tests' own package is editable, a finder of its would add the kernels.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import torch, grcsf_kernels; print(grcsf_kernels.__file__)\n"
        "image, prediction = torch.zeros(1, 1, 2, 4, 6), torch.zeros(1, 1, 6, 8)\n"
        "grcsf_kernels.residual_map(image, prediction, patch_size=2)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "TRITON_INTERPRET": "0"}
    result = run([sys.executable, "-c", use], tmp_path, **environment)
    assert str(tmp_path / "installed") in result.stdout, result.stdout
    assert "RuntimeWarning" in result.stdout and "no C++ compiler was found" in result.stdout


def test_an_editable_package_without_kernels_leaves_no_older_ones(sdist, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree")
    older = tree / f"grcsf_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.write_bytes(b"of another build")
    hook(tree, "editable", tmp_path / "dist", GRCSF_BUILD_CPU="0")
    assert not older.exists()
    said = json.loads((tree / "grcsf_kernels/_build_info.json").read_text())["native"]
    assert "GRCSF_BUILD_CPU=0" in said


def test_without_a_compiler_it_installs_as_pure_python(tmp_path, no_compiler):
    result = build(tmp_path, PATH=no_compiler, CXX="")
    assert result.returncode == 0, result.stdout
    assert not list((tmp_path / "lib").rglob("_C*"))
    assert info(tmp_path)["native"].startswith("no C++ compiler was found")
    assert "warning: building without native kernels" in result.stdout


@pytest.mark.parametrize("switch", ["GRCSF_BUILD_CPU", "GRCSF_BUILD_CUDA"])
def test_without_a_compiler_it_fails_where_native_kernels_are_demanded(
    tmp_path, no_compiler, switch
):
    result = build(tmp_path, PATH=no_compiler, CXX="", **{switch: "1"})
    assert result.returncode != 0 and "building grcsf_kernels._C failed" in result.stdout


def test_a_compiler_that_fails_ends_the_build(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: the license has expired' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = build(tmp_path, CXX=str(broken))
    assert result.returncode != 0 and not (tmp_path / "lib").exists()
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("building grcsf_kernels._C failed:") and "GRCSF_BUILD_CPU=0" in last


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    result = build(tmp_path, CXX="/nowhere/g++ -m64")
    assert result.returncode != 0
    assert "CXX names /nowhere/g++, which is not there" in result.stdout


def test_without_cmake_a_build_ends_with_the_remedy(tmp_path, no_compiler):
    (Path(no_compiler) / "cmake").unlink()
    result = build(tmp_path, PATH=no_compiler, CXX=sys.executable)
    assert result.returncode != 0
    assert "cmake was not found; install it (pip install cmake)" in result.stdout


def test_two_builds_at_once_wait_for_one_another(tmp_path):
    """With a CMake that fails where another is at work."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    fake = tmp_path / "tools/cmake"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\ncd '{tmp_path}' && mkdir working || exit 1\nsleep 1\n"
        f"rmdir working\ntouch temp/cmake/_C{suffix}\necho 'GRCSF_CUDA: built'\n"
    )
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    with ThreadPoolExecutor(2) as both:
        results = list(both.map(lambda _: build(tmp_path, PATH=path), range(2)))
    assert [result.returncode for result in results] == [0, 0], results


def test_another_compiler_begins_the_build_folder_anew(tmp_path):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    fake = tmp_path / "tools/cmake"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch '{tmp_path}/temp/cmake/_C{suffix}'\n")
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    left = tmp_path / "temp/cmake/CMakeCache.txt"
    kept = []
    for compiler in ("g++", "g++", sys.executable):
        assert build(tmp_path, PATH=path, CXX=compiler).returncode == 0
        kept.append(left.exists())
        left.touch()
    assert kept == [False, True, False]


def test_switched_off(tmp_path):
    result = build(tmp_path, GRCSF_BUILD_CPU="0")
    assert result.returncode == 0, result.stdout
    assert "GRCSF_BUILD_CPU=0" in info(tmp_path)["native"]


@pytest.mark.parametrize("name", ["GRCSF_BUILD_CPU", "GRCSF_BUILD_CUDA"])
def test_a_wrong_switch_is_named(tmp_path, name):
    result = build(tmp_path, **{"CXX": "/nowhere/g++", name: "yes"})
    assert result.returncode != 0
    assert f"{name} is 'yes', expected auto, 1 or 0" in result.stdout


def configure(folder: Path, path: str, *options: str) -> str:
    """What CMake says of CUDA with a PATH of its own."""
    import pybind11

    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    # A cached answer, since the compiler in question is no compiler.
    nvcc = shutil.which("nvcc", path=path)
    return run([*command, f"-DCMAKE_CUDA_COMPILER={nvcc}"], PATH=path).stdout


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU")
def test_cuda_is_not_compiled_unasked_where_no_gpu_is(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tools / "nvcc").chmod(0o755)
    said = configure(tmp_path / "build", f"{tools}:{os.environ['PATH']}")
    assert "GRCSF_CUDA: no GPU was seen when the package was built" in said, said


def test_a_function_that_instruction_sets_share_ends_the_build(tmp_path):
    """The linker takes one copy of it, of AVX-512 perhaps, for every processor."""
    source = tmp_path / "kernel.cpp"
    source.write_text(
        '#include "cpu/runtime/vector.h"\n'
        "namespace grcsf::avx512 {\n"
        "void one(VECTOR<double>& v) { v.resize(v.size() + 3), v.resize(v.size() + 4); }\n"
        "void two(VECTOR<double>& v) { v.resize(v.size() + 5), v.resize(v.size() + 6); }\n"
        "}\n"
    )
    said = {}
    for vector in ("grcsf::Vector", "std::vector"):
        options = ["-std=c++17", "-O2", f"-I{ROOT}/csrc", f"-DVECTOR={vector}", "-c"]
        made = run(["g++", *options, str(source), "-o", str(tmp_path / "kernel.o")])
        assert made.returncode == 0, made.stdout
        check = ["-DNM=nm", "-DISA=avx512", f"-DOBJECTS={tmp_path}/kernel.o"]
        check += ["-P", str(ROOT / "csrc/cpu/runtime/isolated.cmake")]
        said[vector] = run(["cmake", *check])
    assert said["grcsf::Vector"].returncode == 0, said["grcsf::Vector"].stdout
    assert said["std::vector"].returncode != 0
    assert "_M_default_append" in said["std::vector"].stdout


def test_no_folder_of_tests_passes_for_a_package():
    """``tests`` is on the path: where Triton is missing, ``tests/triton`` would be imported."""
    needed = importlib.metadata.requires("grcsf-kernels") or []
    names = {re.split(r"[^\w-]", name)[0].lower().replace("-", "_") for name in needed}
    assert {"torch", "triton"} <= names
    folders = {path.name for path in (ROOT / "tests").iterdir()}
    assert not folders & names


@pytest.mark.parametrize(
    ("guard", "file", "line"),
    [
        ("no-fast-math", "CMakeLists.txt", "add_compile_options(-O3 -ffast-math)"),
        ("no-fast-math", "CMakeLists.txt", "set(CMAKE_CUDA_FLAGS --use_fast_math)"),
        ("no-fast-math", "setup.py", 'flags = ["-march=native"]'),
        ("lazy-triton", "grcsf_kernels/dispatch.py", "import triton"),
        ("torch-free-kernels", "csrc/cpu/gcu/forward.cpp", "#include <ATen/Tensor.h>"),
        ("no-pickle", "grcsf_kernels/engine/data/cache.py", "pickle.loads(data)"),
    ],
)
def test_a_guard_of_the_sources_finds_what_it_is_for(guard, file, line, tmp_path):
    """As pre-commit runs it: ``make lint`` runs the same on the checkout."""
    run(["git", "init", "--quiet"], tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / ".pre-commit-config.yaml", tmp_path)
    said = []
    for text in ("clean = True\n", f"{line}\n"):
        (tmp_path / file).write_text(text)
        run(["git", "add", "--all"], tmp_path)
        said.append(run([sys.executable, "-m", "pre_commit", "run", guard, "-a"], tmp_path))
    assert said[0].returncode == 0 and "Passed" in said[0].stdout, said[0].stdout
    assert said[1].returncode == 1 and f"{file}:1:{line}" in said[1].stdout, said[1].stdout


def test_kernels_of_a_wheel_are_taken_instead_of_compiled(tmp_path):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(f"grcsf_kernels/_C{suffix}", b"kernels")
        made.writestr("grcsf_kernels/_build_info.json", '{"native": "", "cuda": "no GPU"}')
    result = build(tmp_path, GRCSF_BUILD_FROM=str(wheel), PATH="")
    assert result.returncode == 0, result.stdout
    assert (tmp_path / f"lib/grcsf_kernels/_C{suffix}").read_bytes() == b"kernels"
    assert info(tmp_path) == {"native": "", "cuda": "no GPU"}
    result = build(tmp_path, GRCSF_BUILD_FROM=str(tmp_path / "none.whl"))
    assert result.returncode != 0 and "GRCSF_BUILD_FROM=" in result.stdout


def test_no_example_replaces_the_torch_that_is_there():
    pages = [*(ROOT / "docs/examples").glob("*/README.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) >= 4 and all("-c torch.txt" in line for line in installs), installs

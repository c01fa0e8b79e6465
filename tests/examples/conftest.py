# SPDX-License-Identifier: Apache-2.0
"""Runs what the README of an example says, word for word, in a copy of the examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Example:
    """A copy of docs/examples, in the folder of one of them."""

    def __init__(self, name, copy):
        shutil.copytree(ROOT / "docs/examples", copy)
        self.folder = copy / name
        self.blocks = re.findall(
            r"```bash\n(.*?)```", (self.folder / "README.md").read_text(), re.S
        )
        assert self.blocks
        self.environment = os.environ | {
            # The sources at hand, and the programs beside this Python.
            "PYTHONPATH": os.pathsep.join(
                p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p
            ),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, commands):
        """Standard output of bash; it stops at the first command that fails."""
        done = subprocess.run(
            ["bash", "-euc", commands],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture
def example(request, tmp_path):
    """The example that the test's file is named after."""
    return Example(request.path.stem.removeprefix("test_"), tmp_path / "examples")

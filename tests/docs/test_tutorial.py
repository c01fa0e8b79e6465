# SPDX-License-Identifier: Apache-2.0
"""docs/tutorial.md: every command in order as a reader copies it, with fewer steps and heads."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("nilearn", reason="needs the extra demo")
pytest.importorskip("typer", reason="needs the extra train")

import torch
from typer.testing import CliRunner

from grcsf_kernels.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
# What makes it small: what is on the left stands in the tutorial.
SMALLER = (
    (r"\b(epochs|steps_per_epoch): \d+", r"\1: 1"),
    (r'(make_dataset\(Path\("[\w/]+"\)), \d+, (seed=\d), spacing=3', r"\1, 1, \2, spacing=6"),
    (r"crop_size: \[48, 48, 48\]", "crop_size: [24, 24, 24]"),
    (r"crop_size: \[32, 32, 32\]", "crop_size: [16, 16, 16]"),
)


def commands(block):
    """Commands of a block: a line, or several up to the end of a here-document."""
    for match in re.finditer(r"^.*<<'EOF'.*\n(?:.*\n)*?EOF$|^.+$", block, re.M):
        yield match.group()


def run(command):
    """As a shell would; grcsf and Python inside this process, which has imported everything."""
    if command.startswith("grcsf "):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    elif command.startswith("python - <<"):
        exec("\n".join(command.splitlines()[1:-1]), {"__name__": "tutorial"})
    else:
        subprocess.run(["bash", "-ec", command], check=True)


def test_every_command_runs(tmp_path, monkeypatch):
    install, *rest = BLOCKS
    assert "pip install" in install and not any("pip install" in block for block in rest)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPO", str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    text = "\n".join(rest)
    for pattern, replacement in SMALLER:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{pattern} is no longer in the tutorial"
    try:
        for command in commands(text):
            run(command)
    finally:
        torch.set_num_threads(threads)
    for page in ("tumor/masks/evaluation.html", "heads/masks/evaluation.html"):
        assert page in TEXT and (tmp_path / page).stat().st_size > 50_000


def test_installation_names_what_there_is():
    """The extra exists, torch is pinned as the Makefile pins it, and the case files are there."""
    install = BLOCKS[0]
    torch_version = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text()).group()
    assert f"pip install {torch_version}\n" in install
    assert re.search(r"^demo = ", (ROOT / "pyproject.toml").read_text(), re.M)
    listed = re.search(r"^```text\n(.*?)^```", TEXT, re.M | re.S).group(1).split()
    assert listed == sorted(path.name for path in (ROOT / "tests/data").glob("brain1_crop*"))

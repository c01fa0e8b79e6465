# SPDX-License-Identifier: Apache-2.0
"""Commands in the environments of notebooks, containers, CI and old terminals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from engine.conftest import blob, make_model, train_config, write

from grcsf_kernels import engine

# Every command line of a list, in one process, as the entry point runs it.
MAIN = """
import json, os, sys
from grcsf_kernels.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["grcsf", *(os.fsdecode(text.encode()) for text in arguments)]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), (arguments, end.code)
"""
# What a name of a file may hold: markup, a color, the end of a line, and what ASCII lacks.
NAME = "a[bold]b[red]\x1b[31mc\ndé"
# A notebook's plots, a terminal without size, colors, letters or home, and odd numbers of threads.
ODD = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "COLUMNS": "0",
    "LINES": "many",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "FORCE_COLOR": "",
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "OMP_NUM_THREADS": "3",
    "MKL_NUM_THREADS": "0",
    "HOME": "/nonexistent",
    "XDG_CACHE_HOME": "/nonexistent/cache",
    "XDG_CONFIG_HOME": "/nonexistent/config",
    "MPLCONFIGDIR": "/nonexistent/mpl",
}


@pytest.fixture
def folder(tmp_path):
    """Two cases with odd names, in folders of which the names are odd as well."""
    data = tmp_path / "data[x]é"
    for index in range(2):
        image, label = blob(index)
        write(data / f"{NAME}{index}_image.nii.gz", image)
        write(data / f"{NAME}{index}_label.nii.gz", label)
    config = train_config(use_rcu=False, epochs=1, steps_per_epoch=1)
    config.validation_fraction, config.overlays, config.validation_every = 0.5, 1, 1
    engine.save_config(config, tmp_path / "train.yaml")
    return tmp_path


def test_every_command_runs_whatever_the_environment_and_the_names(folder):
    data, model = folder / "data[x]é", make_model(folder / "model.safetensors")
    lines = [
        ["train", data, "-o", folder / "run[red]", "-c", folder / "train.yaml"],
        ["predict", data, "-m", model, "-o", folder / "masks", "--device", "cpu"],
        ["evaluate", folder / "masks", data],
        ["config", "train"],
        ["--help"],
        ["doctor"],
    ]
    command = [sys.executable, "-c", MAIN, json.dumps([[str(x) for x in line] for line in lines])]
    run = subprocess.run(command, capture_output=True, env=os.environ | ODD, check=False)
    said, results = run.stderr.decode("ascii"), run.stdout.decode("ascii")
    assert run.returncode == 0, said
    assert "Traceback" not in said and "\x1b" not in said + results
    assert "mean" in results and "\\xc3\\xa9" in results
    assert (folder / "masks/evaluation.html").stat().st_size > 10_000
    assert (folder / "run[red]/model.safetensors").is_file()
    assert len(list((folder / "masks").glob("*_mask.nii.gz"))) == 2

# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``grcsf`` command; the commands are in ``commands.py``."""

from __future__ import annotations

import importlib.util
import os
import sys

_NEEDED = ("typer", "rich", "monai", "nibabel", "lightning_fabric", "safetensors", "scipy", "yaml")


def main() -> None:
    """``grcsf doctor`` runs without the ``train`` extra; everything else needs it."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is escaped, and stops nothing.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:2] == ["doctor"] and "--help" not in sys.argv[2:]:
        from grcsf_kernels.doctor import main as doctor

        raise SystemExit(doctor())
    if sys.argv[1:2] == ["--version"]:
        from grcsf_kernels._version import __version__

        sys.stdout.write(f"grcsf-kernels {__version__}\n")
        raise SystemExit(0)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _fail(
            f'grcsf needs {", ".join(missing)}: pip install "grcsf-kernels[train]" '
            "(grcsf doctor runs without)"
        )
    # MONAI imports matplotlib, which refuses the value that notebooks hand down to their shells.
    # Nothing is ever shown here.
    os.environ["MPLBACKEND"] = "agg"
    try:
        from grcsf_kernels.cli.commands import app
        from grcsf_kernels.cli.guard import handle_sigterm
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:  # a damaged or unfit package among those that it is built on
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _fail(
            f"error: grcsf can't be loaded ({problem}); install it again with "
            'pip install "grcsf-kernels[train]"; grcsf doctor says what there is'
        )
    handle_sigterm()
    app()


def _fail(line: str, status: int = 1) -> None:
    sys.stderr.write(f"{line}\n")
    raise SystemExit(status)

# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``grcsf`` command; the commands are in ``engine/commands.py``."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("typer", "rich", "monai", "nibabel", "lightning_fabric", "safetensors", "scipy", "yaml")


def main() -> None:
    """``grcsf doctor`` runs without the ``train`` extra; everything else needs it."""
    if sys.argv[1:2] == ["doctor"]:
        from grcsf_kernels.doctor import main as doctor

        raise SystemExit(doctor())
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'grcsf needs {", ".join(missing)}: pip install "grcsf-kernels[train]" '
            "(grcsf doctor runs without)\n"
        )
        raise SystemExit(1)
    from grcsf_kernels.engine.commands import app

    app()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.preferences FOLDER``: where Triton beat CUDA C++, for dispatch.

Reads the results of a GPU (``benchmarks/results/<device>-<date>``) and replaces the rows of that
folder in ``grcsf_kernels/backend_preferences.json``: one for each operator, dtype and size at which
the Triton kernels, forward with backward where that was measured, else forward, were the faster
ones by more than both rows' spread.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.dispatch import OPERATORS

TABLE = Path(__file__).resolve().parents[2] / "grcsf_kernels/backend_preferences.json"


def faster_on_triton(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Rows for the table; the range of voxels is that from one power of two to the next."""
    found: dict[tuple[str, str, str], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        dtype = re.search(r"\b(float32|bfloat16|float16)\b", row["case"])
        if row["subject"] in OPERATORS and dtype and row["peer"] in ("triton", "cuda"):
            key = (row["subject"], row["case"], dtype[1])
            found.setdefault(key, {}).setdefault(row["direction"], {})[row["peer"]] = row
    done = set()
    for (operator, case, dtype), directions in sorted(found.items()):
        pairs = [pair for pair in directions.values() if len(pair) == 2]
        if not pairs:
            continue
        pair = max(pairs, key=lambda pair: pair["cuda"]["median"])  # forward with backward
        if pair["triton"]["q3"] >= pair["cuda"]["q1"]:
            continue
        low = 1 << (int(pair["cuda"]["voxels"]).bit_length() - 1)
        if (operator, dtype, low) not in done:
            done.add((operator, dtype, low))
            yield {
                "operator": operator,
                "dtype": dtype,
                "voxels": [low, 2 * low],
                "source": source,
                "case": case,
                "seconds": {name: one["median"] for name, one in sorted(pair.items())},
            }


def main(arguments: list[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.preferences", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="results of a GPU")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    source = str(folder.relative_to(TABLE.parents[1]))
    rows = json.loads(TABLE.read_text())["rows"]
    rows = [row for row in rows if row["source"] != source]
    new = list(faster_on_triton(results.load(folder)["rows"], source))
    text = json.dumps({"rows": rows + new}, indent=1) + "\n"
    write_whole(TABLE, lambda path: path.write_text(text))
    sys.stdout.write(f"{len(new)} rows from {source}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

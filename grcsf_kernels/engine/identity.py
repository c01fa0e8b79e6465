# SPDX-License-Identifier: Apache-2.0
"""In what two trainings differ, by what they left: states and model files."""

from __future__ import annotations

import json
from typing import Any

from grcsf_kernels.common.settings import to_dict

_SHOWN = 5


def differences(there: str, asked: str) -> str:
    """What differs between two identities of :func:`grcsf_kernels.engine.config.run_identity`.

    Args:
        there: of the state.
        asked: of the call.
    """
    try:
        left, right = json.loads(there), json.loads(asked)
        found = _settings(left[0], right[0]) + _cases(left[-2], right[-2])
        # Between the settings and the cases: the mask ratio of an autoencoder.
        found += _values("mask ratio", left[1:-2], right[1:-2])
        found += _values("number of processes", left[-1], right[-1])
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError):
        found = []
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more) or "it does not say in what"


def unlike(own: Any, other: Any) -> str:
    """In what settings in a model file, such as its DataConfig, differ from those of another."""
    left, right = to_dict(own), to_dict(other)
    found = [
        f"{name} {left[name]}, not {right[name]}" for name in left if left[name] != right[name]
    ]
    return ", ".join(found)


def _settings(there: dict[str, Any], asked: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*asked, *there]):
        left, right = (values.get(name, "not set") for values in (there, asked))
        if isinstance(left, dict) and isinstance(right, dict):
            found += _settings(left, right, f"{where}{name}.")
        else:
            found += _values(f"{where}{name}", left, right)
    return found


def _values(name: str, there: Any, asked: Any) -> list[str]:
    return [] if there == asked else [f"{name} is {there} there and {asked} asked for"]


def _cases(there: list[str], asked: list[str]) -> list[str]:
    found = []
    for names, others, what in (
        (there, asked, "there and not asked for"),
        (asked, there, "asked for and not there"),
    ):
        alone = sorted(set(names) - set(others))
        if alone:
            shown = ", ".join(alone[:_SHOWN]) + (", ..." if len(alone) > _SHOWN else "")
            found.append(f"{len(alone)} case(s) ({shown}) are {what}")
    return found or ([] if there == asked else ["the cases have another order"])

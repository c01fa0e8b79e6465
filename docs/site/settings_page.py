# SPDX-License-Identifier: Apache-2.0
"""Writes docs/settings.md from the settings themselves: python docs/site/settings_page.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from grcsf_kernels.common.settings import expected
from grcsf_kernels.engine import config as configs
from grcsf_kernels.engine.settings_yaml import descriptions

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
HEAD = """# Settings

Every setting of every command. They are YAML for `--config`; what a file leaves out keeps its
default, and an option on the command line comes before both:

    grcsf config train > train.yaml      # all of them, with the defaults and what they mean
    grcsf train data/ -o run/ --residuals maps/ -c train.yaml

`--preset small` of `grcsf pretrain` and `grcsf train` takes other defaults, for a CPU:
[below](#preset-small). A setting that is unknown, of another type, out of its range, infinite or
NaN is refused with the file, its name and what was expected. So are keys that come twice and
aliases. Numbers are those of YAML 1.2: `1e-4` is a number.

From Python the same settings are dataclasses of [`grcsf_kernels.engine`](api/engine.md).

This page is made from the code: `python docs/site/settings_page.py`.
"""


def page() -> str:
    """The page in Markdown."""
    return "\n".join([HEAD, *_sections(), *_presets()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    shown: dict[type, str] = {}
    for command in ("pretrain", "residuals", "train", "predict", "evaluate"):
        yield f"## grcsf {command}\n"
        yield from _tables(getattr(configs, f"{command.capitalize()}Config"), command, "", shown)


def _tables(cls: type, command: str, section: str, shown: dict[type, str]) -> Iterator[str]:
    parts = [e.name for e in dataclasses.fields(cls) if dataclasses.is_dataclass(_default(e))]
    if section:
        yield f"### {command}: `{section}`\n"
    if cls in shown:
        yield f"As for [{shown[cls]}](#{shown[cls].replace(':', '').replace(' ', '-')}).\n"
        return
    shown[cls] = f"{command}: {section}" if section else f"grcsf {command}"
    if section:
        yield " ".join((cls.__doc__ or "").split()) + "\n"
    yield "| setting | default | may be | |\n| --- | --- | --- | --- |"
    texts = descriptions(cls)
    for entry in dataclasses.fields(cls):
        if entry.name not in parts:
            value = _yaml(_default(entry))
            text = texts[entry.name].replace("<case>", "`<case>`")
            yield f"| `{entry.name}` | `{value}` | {expected(cls, entry.name)} | {text} |"
    yield ""
    for name in parts:
        (entry,) = (e for e in dataclasses.fields(cls) if e.name == name)
        yield from _tables(type(_default(entry)), command, name, shown)


def _presets() -> Iterator[str]:
    for name, commands in configs.PRESETS.items():
        yield f"## Preset: {name}\n"
        yield (
            "For a CPU, to try things out: networks, crops and trainings for results are larger. "
            "The defaults take days on a CPU.\n"
        )
        for command, values in commands.items():
            yield f"`grcsf {command}`:\n\n```yaml\n{_block(values)}```\n"


def _block(values: dict[str, Any], indent: str = "") -> str:
    text = ""
    for name, value in values.items():
        if isinstance(value, dict):
            text += f"{indent}{name}:\n" + _block(value, f"{indent}  ")
        else:
            text += f"{indent}{name}: {_yaml(value)}\n"
    return text


def _default(entry: dataclasses.Field[Any]) -> Any:
    made = entry.default_factory is not dataclasses.MISSING
    return entry.default_factory() if made else entry.default  # type: ignore[misc]


def _yaml(value: Any) -> str:
    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return yaml.safe_dump([plain(value)], default_flow_style=True, width=10**6).strip()[1:-1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

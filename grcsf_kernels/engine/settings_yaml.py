# SPDX-License-Identifier: Apache-2.0
"""Settings in YAML, with numbers as YAML 1.2 has them and nothing that could surprise.

PyYAML reads YAML 1.1, where ``1e-4`` is text, ``010`` is 8 and ``1:30`` is 90. A key that comes
twice is refused, and so are aliases, with which a few lines can stand for gigabytes.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.settings import to_dict, update

Config = TypeVar("Config")

# A file of settings has a few kilobytes.
_LARGEST_FILE = 100_000

_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_NUMBERS = (
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
)


def _with_numbers(cls: Any) -> Any:
    """``cls`` with the numbers of YAML 1.2, and without its dates."""
    replaced = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _NUMBERS:
        cls.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list("-+.0123456789"))
    return cls


class Loader(yaml.SafeLoader):
    """Reads settings."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; aliases are refused."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "an alias (*) stands for a value: write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that comes twice is refused."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> int:
        """A whole number: decimal, 0o... or 0x..."""
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads back to the same."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out each time."""
        return True


_with_numbers(Loader)
_with_numbers(Dumper)
Loader.add_constructor(_INT, Loader.construct_whole)


def load_config(cls: type[Config], path: Path, base: Config | None = None) -> Config:
    """Read a YAML file.

    Args:
        cls: one of the dataclasses of ``config.py``.
        path: the file, in UTF-8.
        base: what settings are that the file leaves out, changed in place; None: the defaults.

    Raises:
        InputError: the file can't be read, or a setting is unknown, of the wrong type or out of its
            range.
    """
    path = Path(path)
    remedy = "expected YAML as grcsf config prints it"
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise InputError(path, f"is larger than {_LARGEST_FILE} bytes", remedy)
        values = yaml.load(data, Loader=Loader)
    except RecursionError:
        raise InputError(path, "is nested too deep", remedy) from None
    except yaml.reader.ReaderError as error:
        problem = f"byte or character {error.position} can't be read: {error.reason}"
        raise InputError(path, problem, "save it as text in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        problem = " ".join((error.problem or error.context or "no YAML").split())
        hint = ", with spaces in place of tabs" if "'\\t'" in problem else ""
        raise InputError(path, f"can't be read ({line}{problem})", remedy + hint) from error
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise InputError(path, f"can't be read ({problem})", remedy) from error
    config = cls() if base is None else base
    return update(config, {} if values is None else values, str(path))


def dump_config(config: Any, *, comments: bool = False) -> str:
    """The YAML text of a configuration, every setting in it; ``comments`` say what each is."""

    def lines(part: Any, indent: str) -> Iterator[str]:
        texts = descriptions(type(part)) if comments else {}
        for name, value in to_dict(part).items():
            comment = texts.get(name, "")
            if isinstance(value, dict):
                yield f"{indent}{name}:" + (f"  # {comment}" if comment else "")
                yield from lines(getattr(part, name), f"{indent}  ")
                continue
            # As the only item of a list in brackets: the value on one line.
            text = yaml.dump([value], Dumper=Dumper, default_flow_style=True, width=10**6)
            yield f"{indent}{name}: {text.strip()[1:-1]}" + (f"  # {comment}" if comment else "")

    return "\n".join(lines(config, "")) + "\n"


def save_config(config: Any, path: Path) -> None:
    """Write a configuration as YAML, whole."""
    text = dump_config(config)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def descriptions(cls: type) -> dict[str, str]:
    """What the text under each setting in the source of ``cls`` says, by name, in one line.

    Empty where the source is not there.
    """
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    (body,) = (node for node in ast.parse(textwrap.dedent(source)).body)
    assert isinstance(body, ast.ClassDef)
    found = {}
    for entry, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(entry, ast.AnnAssign)
            and isinstance(entry.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[entry.target.id] = " ".join(str(after.value.value).split())
    return found

# SPDX-License-Identifier: Apache-2.0
"""How settings are checked: the same for YAML, the command line and Python.

What a setting may be is its annotation in ``config.py``: a type, and where numbers are limited an
``Annotated`` with :class:`Bounds`. Infinity and NaN are refused everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from grcsf_kernels.common.errors import InputError

Config = TypeVar("Config")

# Whole numbers without a bound of their own. Sizes and counts become signed 32-bit at the least.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Bounds:
    """Of a number: ``least`` and ``most`` may be reached, ``above`` and ``below`` may not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether ``value`` is inside."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}"
        texts = []
        if self.below is not None:
            texts.append(f"below {self.below}")
        if self.above is not None:
            texts.append(f"above {self.above}")
        if self.most is not None:
            texts.append(f"at most {self.most}")
        if self.least is not None:
            texts.append(f"{self.least} or more")
        return " and ".join(texts)


@dataclass(frozen=True)
class Ascending:
    """Of a pair: the lower value comes first; ``strict``: they differ."""

    strict: bool = False

    def hold(self, value: tuple[float, float]) -> bool:
        """Whether the pair is in order."""
        return value[0] < value[1] or (not self.strict and value[0] == value[1])

    def __str__(self) -> str:
        return "the lower bound first" if self.strict else "two values, the lower first"


@dataclass(frozen=True)
class NotEmpty:
    """Of a list: it has at least one value."""

    def hold(self, value: tuple[Any, ...]) -> bool:
        """Whether there is one."""
        return bool(value)

    def __str__(self) -> str:
        return "at least one value"


@dataclass(frozen=True)
class Distinct:
    """Of a list: no value comes twice."""

    def hold(self, value: tuple[Any, ...]) -> bool:
        """Whether all of them differ."""
        return len(set(value)) == len(value)

    def __str__(self) -> str:
        return "values that differ"


Count = Annotated[int, Bounds(above=0)]
CountOrZero = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
ShareBelowOne = Annotated[float, Bounds(least=0, below=1)]
ShareBetween = Annotated[float, Bounds(above=0, below=1)]
# Seeds are mixed as 32 bits: larger ones would repeat the random numbers of smaller ones.
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]


class _Misfit(Exception):
    """A value that is not what its annotation says; holds what was expected."""


def check(config: Any, where: str = "") -> None:
    """Look over a configuration, whatever it was made from.

    What means the same becomes the same: lists become tuples, whole numbers in place of others
    ``float``, paths text.

    Args:
        config: one of the dataclasses of ``config.py``; changed in place.
        where: what stands before the names of settings in errors, such as ``"model."``.

    Raises:
        InputError: a setting is of a wrong type, out of its range, not finite, or does not go with
            another; the message names it.
    """
    for name, hint in hints_of(type(config)).items():
        setattr(config, name, _field(hint, getattr(config, name), f"{where}{name}"))
    agree = getattr(config, "agree", None)
    if agree is not None:
        agree(where)


def from_dict(cls: type[Config], values: Any, where: str, section: str = "") -> Config:
    """A configuration of class ``cls`` from plain types.

    Args:
        cls: one of the dataclasses of ``config.py``.
        values: a mapping; what it leaves out keeps its default.
        where: the source, for errors.
        section: the names before those of this mapping, such as ``"model."``.

    Raises:
        InputError: a key that does not exist, or a value that its setting does not take.
    """
    return update(cls(), values, where, section)


def update(config: Config, values: Any, where: str, section: str = "") -> Config:
    """Set what ``values`` names in ``config``, as :func:`from_dict` does; returns ``config``."""
    place = f"{where}: {section.rstrip('.')}" if section else where
    if not isinstance(values, dict):
        raise InputError(place, f"holds {_shown(values)}", "expected a mapping of settings")
    hints = hints_of(type(config))
    for key, value in values.items():
        if key not in hints:
            expected = f"expected one of {', '.join(hints)}"
            near = _nearest(type(config), key)
            expected += f"; the nearest is {near}" if near else ""
            raise InputError(place, f"unknown setting {_shown(key)}", expected)
        name = f"{section}{key}"
        if dataclasses.is_dataclass(hints[key]):
            update(getattr(config, key), value, where, f"{name}.")
        else:
            setattr(config, key, _field(hints[key], value, f"{where}: {name}"))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in plain YAML and JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def expected(cls: type, name: str) -> str:
    """What a setting may be, in words."""
    return _in_words(hints_of(cls)[name])


def hints_of(cls: Any) -> dict[str, Any]:
    """The annotations of the settings of a dataclass, by name."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint for name, hint in hints.items() if name in names}


def _field(hint: Any, value: Any, where: str) -> Any:
    """A value as its annotation has it."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, typing.cast(type, hint)):
            raise InputError(
                where, f"is {_shown(value)}", f"expected {typing.cast(type, hint).__name__}"
            )
        check(value, f"{where}.")
        return value
    try:
        return _fit(hint, value)
    except _Misfit as misfit:
        raise InputError(where, f"is {_shown(value)}", f"expected {misfit}") from None


def _fit(hint: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = _fit(inner[0], value)
        for limit in inner[1:]:
            if not limit.hold(fitted):
                raise _Misfit(str(limit))
        if isinstance(fitted, int) and fitted > max(_LARGEST, *(_most(x) for x in inner[1:])):
            raise _Misfit(f"at most {_LARGEST}")
        return fitted
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _fit(_not_none(inner), value)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inner):
            raise _Misfit(_choices(inner))
        return value
    if origin is tuple:
        length = None if inner[-1] is Ellipsis else len(inner)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise _Misfit("a list" if length is None else f"a list of {length}")
        kinds = inner if length else inner[:1] * len(value)
        return tuple(_fit(kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise _Misfit("a finite number")
        return number
    if hint is str and isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if not isinstance(text, str) or not text or "\0" in text:
            raise _Misfit("a text that is not empty")
        return text
    raise _Misfit(hint.__name__)


def _most(limit: Any) -> float:
    most = getattr(limit, "most", None)
    return 0 if most is None else most


def _not_none(options: tuple[Any, ...]) -> Any:
    return next(option for option in options if option is not types.NoneType)


def _choices(values: tuple[Any, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _in_words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = [str(limit) for limit in inner[1:]]
        return ", ".join([_in_words(inner[0]), *limits])
    if origin in (types.UnionType, typing.Union):
        return f"{_in_words(_not_none(inner))}; or null"
    if origin is typing.Literal:
        return _choices(inner)
    if origin is tuple:
        count = "list of" if inner[-1] is Ellipsis else f"{len(inner)} values:"
        return f"{count} {_in_words(inner[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[hint]


def _nearest(cls: type, key: Any) -> str | None:
    """The setting of ``cls`` whose name is most like ``key``, with that of its section."""

    def names(cls: type, section: str = "") -> Iterator[tuple[str, str]]:
        for name, hint in hints_of(cls).items():
            yield name, f"{section}{name}"
            if dataclasses.is_dataclass(hint):
                yield from names(typing.cast(type, hint), f"{section}{name}.")

    known: dict[str, str] = {}
    for name, dotted in names(cls):
        known.setdefault(name, dotted)
    close = difflib.get_close_matches(str(key)[:100], known, n=1)
    return known[close[0]] if close else None


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 60, 60


def _shown(value: Any) -> str:
    """A value in a line, whatever it is."""
    try:
        return " ".join(_short.repr(value).split())
    except ValueError:  # a whole number of thousands of digits
        return "a number with too many digits"

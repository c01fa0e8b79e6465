# SPDX-License-Identifier: Apache-2.0
"""Formulas of docstrings, as Sphinx writes them, in the form that Markdown takes."""

from __future__ import annotations

import re
from typing import Any

import griffe

# The line of the directive, and the lines after it that are indented deeper.
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|[ \t]*(?=\n\1 +\S)))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]*)`")


def to_markdown(text: str) -> str:
    """A docstring with its formulas between dollars."""
    text = _BLOCK.sub(lambda m: f"\n{m[1]}$$\n{m[1]}{' '.join(m[2].split())}\n{m[1]}$$\n", text)
    return _INLINE.sub(r"$\1$", text)


class Formulas(griffe.Extension):
    """Changes every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

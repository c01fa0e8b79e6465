# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter faster, for the tests that run every kernel on it.

The interpreter replaces the functions of ``triton.language`` by its own when a kernel starts, and
again at every call of one jitted function by another, which takes almost half of its time. Once a
launch is enough for each module. Half of the rest goes to looking for overflow in every operation
on 32-bit integers, which volumes of a few hundred voxels don't have.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def be_quick() -> None:
    """Patch once a launch and look for no overflow, if Triton has the parts for it."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or executor is None or scope is None:
        return
    builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    run = executor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return scope()
        patched.add(module)
        return patch(function)

    def run_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return run(self, *arguments, **options)

    interpreter._patch_lang = patch_once
    executor.__call__ = run_launch

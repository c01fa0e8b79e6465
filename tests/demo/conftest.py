# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the engine's tests."""

from __future__ import annotations

from engine.conftest import folder, model, one_thread

__all__ = ["folder", "model", "one_thread"]

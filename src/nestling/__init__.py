"""Nestling: language models that keep learning while you use them.

Sub-packages load when first used: `import nestling as nl; nl.memory.names()`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestling import memory as memory
    from nestling.memory import Report as Report

__version__ = version("nestling")

_PACKAGES = ("bench", "layers", "learn", "memory", "models", "optim", "processor", "state", "stream", "testing")


def __getattr__(name: str) -> Any:
    if name == "Report":
        return importlib.import_module("nestling.memory").Report
    if name in _PACKAGES:
        return importlib.import_module(f"nestling.{name}")
    raise AttributeError(f"module 'nestling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES, "Report"])

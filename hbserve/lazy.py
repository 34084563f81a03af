"""Lazy imports of the public names of packages, at their first use.

The scheduler's process needs no torch, and a worker needs no HTTP server: to import a module of one must not import
those of the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_attributes(modules: dict[str, str], package: str) -> Callable[[str], Any]:
    """Make a module's ``__getattr__`` that imports each name from the module given for it (PEP 562)."""

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return getattr_

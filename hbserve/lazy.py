"""Packages whose public names are imported when they are first used.

The scheduler's process needs no torch and a worker needs no HTTP server; importing one of their
modules must not import the other's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_attributes(modules: dict[str, str], package: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds each name in the module given for it (PEP 562)."""

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return getattr_

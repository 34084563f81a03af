"""The supported families of models: every `Family` that a module of this folder declares is registered.

docs/add_a_model.md walks through a new one.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType

from hbserve.model_families.declaration import Family


def _declared() -> dict[str, Family]:
    """Import the modules of this folder, and return what they declare by transformers' ``model_type``."""
    found: dict[str, Family] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, Family):
                assert found.setdefault(value.model_type, value) is value, f"{value.model_type} is declared twice"
    return dict(sorted(found.items()))


FAMILIES = MappingProxyType(_declared())
"""Supported families by transformers' ``model_type``."""

BY_ARCHITECTURE = MappingProxyType({family.architecture: family for family in FAMILIES.values()})
"""The same by transformers' class name."""

_BY_SPELLING = {name.lower().replace("_", ""): family for name, family in BY_ARCHITECTURE.items()}


def family_of(architecture: str) -> Family | None:
    """Return the family of a class name, or None. Case and underscores do not count.

    Some checkpoints have the name of a class that came before transformers' own: ``ExaoneMoEForCausalLM``,
    ``Ernie4_5_ForCausalLM``, ``LLaMAForCausalLM``.
    """
    return _BY_SPELLING.get(architecture.lower().replace("_", ""))

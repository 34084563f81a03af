"""Import of classes that a user names in the configuration."""

from __future__ import annotations

import importlib
from typing import TypeVar

from hbserve.errors import ConfigError

T = TypeVar("T")


def load_class(import_path: str, base: type[T], key: str) -> type[T]:
    """Import the class at ``package.module:Class``.

    Raises:
        ConfigError: naming the key, if there is no such class or it is not a subclass of ``base``.
    """
    module_name, _, class_name = import_path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot import {import_path!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key}: {import_path!r} is not a subclass of {base.__module__}.{base.__name__}")
    return found

"""Classes that a user names in the configuration, or gives as they are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hbserve.errors import ConfigError, StartupError

T = TypeVar("T")
_imports: list[str] = []
"""Import paths that `load_class` is importing now."""


def load_class(import_path: str, base: type[T], key: str) -> type[T]:
    """Import the class at ``package.module:Class``.

    Raises:
        ConfigError: naming the key, if there is no such class or it is not a subclass of ``base``.
    """
    module_name, _, class_name = import_path.partition(":")
    try:
        with _importing(import_path):
            found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot import {import_path!r}: {error}") from None
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        what = f"{key}: cannot import {import_path!r}: {str(error) or repr(error)}"
        hint = "; a program that other processes import starts its work under if __name__ == '__main__':"
        raise ConfigError(what + hint) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key}: {import_path!r} is not a subclass of {base.__module__}.{base.__name__}")
    return found


@contextmanager
def _importing(import_path: str) -> Iterator[None]:
    _imports.append(import_path)
    try:
        yield
    finally:
        _imports.pop()


def check_not_importing() -> None:
    """Check that no module of a user's class is being imported, before a system is started.

    A program that starts a system whenever it is imported would start one in each of the system's own processes.

    Raises:
        StartupError: saying what to do.
    """
    if _imports:
        raise StartupError(f"the import of {_imports[-1]!r} starts a system")


def path_of_class(kind: type[Any], key: str) -> str:
    """Return the ``package.module:Class`` under which other processes can import a class.

    Raises:
        ConfigError: naming the key, if they cannot.
    """
    module_name = kind.__module__
    if module_name == "__main__":
        module_name = _name_of_main() or module_name
    name = kind.__qualname__
    is_found = name.isidentifier() and getattr(sys.modules.get(kind.__module__), name, None) is kind
    if not is_found or module_name == "__main__":
        raise ConfigError(
            f"{key}: other processes cannot import {kind.__module__}.{name}; define the class at the top of a module "
            f"that is a file, and give the class, or 'package.module:{kind.__name__}'",
            key,
        )
    return f"{module_name}:{name}"


def _name_of_main() -> str | None:
    """Return the name under which child processes can import the program; they have its ``sys.path``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    if file is None:  # typed in, or given by -c
        return None
    path = Path(file).resolve()
    is_importable = path.suffix == ".py" and path.stem.isidentifier()
    return path.stem if is_importable and str(path.parent) in map(_resolved, sys.path) else None


def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())

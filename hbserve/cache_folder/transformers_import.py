"""A faster import of transformers, for processes of HBServe that need it for tokenizers and configurations only.

Its import reads all its 3,000 source files, twice, for the names that they export: more than half of its time. The
names are kept in the cache folder, for as long as the installed package is the same.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hbserve.cache_folder import cache_folder

_MODULE = "transformers.utils.import_utils"
Names = dict[frozenset[str], dict[str, set[str]]]
"""Libraries -> module -> names that need these libraries, as transformers' `define_import_structure` returns them."""


def leave_out_torch() -> None:
    """Keep transformers from importing its parts for torch, which neither tokenizers nor configurations need.

    This halves the start time of a process and saves 180 MB. Other code can still import torch. For processes of
    HBServe only, and before they have other threads: in this process transformers will never find torch.
    """
    if "transformers" in sys.modules:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would warn that torch is missing
    torch = sys.modules.get("torch")
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes Python raise ImportError
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import transformers.utils

        transformers.utils.is_torch_available()  # it remembers the answer
    finally:
        sys.meta_path.remove(finder)
        del sys.modules["torch"]
        if torch is not None:
            sys.modules["torch"] = torch


class _Finder:
    """Import hook: puts `kept_names` in the place of the function that reads the source files, once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            read = getattr(module, "define_import_structure", None)
            if read is not None:
                version = getattr(sys.modules.get("transformers"), "__version__", "")
                module.define_import_structure = lambda path, prefix=None: kept_names(read, version, path, prefix)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def kept_names(read: Callable[..., Names], version: str, path: str | Path, prefix: str | None = None) -> Names:
    """Return ``read(path, prefix)``; if the path is the folder of all models, from the cache folder.

    Args:
        read: transformers' `define_import_structure`.
        version: of transformers.
        path: a folder, or a file in it that stands for it.
        prefix: of the modules' names.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if folder.name != "models":
        return read(path, prefix)
    installed = f"{version} {folder} {folder.stat().st_mtime_ns}"
    file = cache_folder() / f"transformers-{hashlib.sha256(installed.encode()).hexdigest()[:16]}.json"
    try:
        names = _names_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        names = read(path)
        _keep(file, names)
    if prefix is None:
        return names
    return {libraries: {f"{prefix}.{name}": of for name, of in modules.items()} for libraries, modules in names.items()}


def _names_of(document: Any) -> Names:
    return {frozenset(libraries): {name: set(of) for name, of in modules.items()} for libraries, modules in document}


def _keep(file: Path, names: Names) -> None:
    """Write the file whole; a folder that cannot be written costs time only."""
    document = [
        [sorted(libraries), {name: sorted(of) for name, of in modules.items()}] for libraries, modules in names.items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".", delete=False, encoding="utf-8") as part:
            json.dump(document, part)
        Path(part.name).replace(file)
    except OSError:
        return

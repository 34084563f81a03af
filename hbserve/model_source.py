"""The name of a model: what a user writes as ``model.path``, ``LLM(...)`` or ``hbserve serve MODEL``.

Nothing is fetched here, so that a configuration can be read anywhere at any time. The process that starts a system
calls `hbserve.model_store`, which turns the name into a folder. Every other process gets the folder's path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hbserve.errors import ConfigError
from hbserve.hints import shown

SHAPES = Path(__file__).resolve().parent / "configs" / "models"
"""Folder of the shapes that come with HBServe: a config.json each, no weights."""

KNOWN_NAMES = ("smollm2",)
"""Models that HBServe fetches by a short name; `hbserve.model_store` has a module for each."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str, beside: Sequence[Path] = ()) -> str:
    """Return the model's folder, as an absolute path without links; or a name that `fetch_model` takes.

    A link that is changed later must not change what a restart loads.

    Args:
        name: a folder in Hugging Face layout, or one of `KNOWN_NAMES`. A folder comes first. A relative path counts
            from the working directory.
        beside: folders from which a relative path counts where the working directory has none.

    Raises:
        ConfigError: without a key; the text says where was looked, and what to do.
    """
    if not name:
        raise ConfigError("give the path of the model's folder; it is empty")
    path = expand_user(name)
    candidates = [path] if path.is_absolute() else [path, *(folder / path for folder in beside)]
    for candidate in candidates:
        if os.path.isdir(candidate):  # unlike Path's own method, False for an impossible name
            return str(candidate.resolve())
    if name in KNOWN_NAMES:
        return name
    places = ", ".join(shown(str(candidate.absolute()))[1:-1] for candidate in candidates)
    what = f"there is no folder {shown(name)} (looked at {places})"
    if _HUB_NAME.fullmatch(name):
        what += f"; models are not downloaded by themselves: hf download {name} --local-dir FOLDER"
    elif "/" not in name:
        what += f"; models that are fetched by name: {', '.join(KNOWN_NAMES)}"
    raise ConfigError(what)


def expand_user(path: str) -> Path:
    """Replace ``~`` and ``~user`` by the home folder.

    Raises:
        ConfigError: without a key, if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{error} (in {shown(path)})") from None

"""The place of a model: what a user writes (``model.path``, ``LLM(...)``, ``hbserve serve MODEL``) becomes a folder.

Only the process that reads the configuration runs this, once; every other process gets the folder's path.
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

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str, beside: Sequence[Path] = ()) -> Path:
    """Return the model's folder, as an absolute path without links.

    A link that is changed later must not change what a restart loads.

    Args:
        name: a folder in Hugging Face layout. A relative path counts from the working directory.
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
            return candidate.resolve()
    places = ", ".join(shown(str(candidate.absolute()))[1:-1] for candidate in candidates)
    what = f"there is no folder {shown(name)} (looked at {places})"
    if _HUB_NAME.fullmatch(name):
        what += f"; models are not downloaded by themselves: hf download {name} --local-dir FOLDER"
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

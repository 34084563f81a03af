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

_HUB_NAME = re.compile(
    r"(?P<repository>(?=[^@]{3,96}(@|$))(?![^@]*(--|\.\.))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])(?<!\.git))(@\w[\w./-]*)?"
)
"""A name that the hub allows: in each part letters, digits, and between them single dots, dashes and underscores."""


def resolve_model(name: str, beside: Sequence[Path] = ()) -> str:
    """Return the absolute path of the model's folder or GGUF file, or else a name that `fetch_model` takes.

    The path of a folder has no links: one that is changed later must not change what a restart loads.

    Args:
        name: a folder in Hugging Face layout, a ``.gguf`` file, one of `KNOWN_NAMES`, or ``org/name[@revision]`` on the
            Hugging Face hub. What exists comes first. A relative path counts from the working directory.
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
        if is_gguf(name) and os.path.isfile(candidate):
            return str(candidate.absolute())  # in a cache, the target of a link may have another kind of name
    if name in KNOWN_NAMES or (_HUB_NAME.fullmatch(name) and not is_gguf(name)):
        return name
    looked = dict.fromkeys(str(candidate.absolute()) for candidate in candidates)
    places = ", ".join(shown(place)[1:-1] for place in looked)
    what = f"there is no {'file' if is_gguf(name) else 'folder'} {shown(name)} (looked at {places})"
    if re.fullmatch(r"[^./~][^/]*/[^/]+", name) and not is_gguf(name):
        what += ", and no repository of the Hugging Face hub can have that name"
    elif "/" not in name:
        what += f"; models that are fetched by name are {', '.join(KNOWN_NAMES)}, and org/name of the Hugging Face hub"
    raise ConfigError(what)


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def known_as(name: str) -> str:
    """Return the name under which users know a model: a folder's or a file's own, or that on the hub."""
    on_hub = _HUB_NAME.fullmatch(name)
    if on_hub is not None and not os.path.exists(name) and not is_gguf(name):
        return on_hub["repository"]
    base = os.path.basename(os.path.normpath(name))
    return base[: -len(".gguf")] if is_gguf(base) else base


def expand_user(path: str) -> Path:
    """Replace ``~`` and ``~user`` by the home folder.

    Raises:
        ConfigError: without a key, if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{error} (in {shown(path)})") from None

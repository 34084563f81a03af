"""A model's name becomes a folder. The process that starts a system does this, before it starts any other."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hbserve.config import Config
from hbserve.model_source import KNOWN_NAMES, is_gguf
from hbserve.model_store.conversion import converted
from hbserve.model_store.hub import fetch_from_hub, name_in_hub_cache
from hbserve.model_store.smollm2 import FOLDER_NAME, fetch_smollm2


def with_model_folder(config: Config) -> Config:
    """Return the configuration with folders in place of its models' names; fetch the models if that is needed.

    Raises:
        ModelError: the model cannot be fetched; the text says what to do.
    """
    draft_model = config.speculation.model
    if draft_model is not None:
        speculation = msgspec.structs.replace(config.speculation, model=str(fetch_model(draft_model)))
        config = msgspec.structs.replace(config, speculation=speculation)
    folder = str(fetch_model(config.model.path))
    if folder == config.model.path:
        return config
    model = msgspec.structs.replace(config.model, path=folder, served_name=config.served_name)
    return msgspec.structs.replace(config, model=model)


def name_of(folder: str) -> str | None:
    """Return the name with which another host can fetch what lies in a folder; None: it has no such name.

    Args:
        folder: path that `fetch_model` has returned, on this host or on another.
    """
    return name_in_hub_cache(folder) or ("smollm2" if Path(folder).name == FOLDER_NAME else None)


def fetch_model(source: str) -> Path:
    """Return the folder of a model; fetch it at its first use.

    Args:
        source: as `hbserve.model_source.resolve_model` returns it.

    Raises:
        ModelError: the model cannot be fetched; the text says what to do.
    """
    if source in KNOWN_NAMES:
        return fetch_smollm2()
    if not os.path.isabs(source):
        return fetch_from_hub(source)
    return converted(Path(source)) if is_gguf(source) and os.path.isfile(source) else Path(source)

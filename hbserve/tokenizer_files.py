"""The tokenizer in a model's folder, as transformers loads it, whichever files it lies in.

The tokenizer room makes text with it. A worker needs its vocabulary, for grammars.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbserve.errors import ModelError
from hbserve.mistral_files import INSTALL, LoadedTokenizer, find_mistral_file, load_mistral_file
from hbserve.model_files import is_there, read_bytes, read_config, read_json, read_text, reason_of

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OTHER_FILES = ("*.jinja", "additional_chat_templates/*.jinja", "vocab.*", "merges.txt", "*.model")
"""Patterns of what the libraries read besides, and would wait for if it were a pipe."""
_IMPORTING = threading.Lock()
"""transformers imports its parts at their first use, and fails if two threads do this at once."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has any tokenizer file."""
    return any(is_there(folder / name) for name in _FILES) or find_mistral_file(folder) is not None


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a folder that has one.

    Raises:
        ModelError: it cannot be used; the message says which file and key are wrong.
    """
    with naming_faults(folder):
        loaded = _load(folder)
        if getattr(loaded.hf, "backend_tokenizer", None) is None:
            raise ModelError(f"the tokenizer in {folder} is not a fast tokenizer; it needs a tokenizer.json")
        return loaded


@contextmanager
def naming_faults(folder: Path) -> Iterator[None]:
    """Turn any error of the libraries, while they read a folder's tokenizer, into one that names file and key.

    Raises:
        ModelError
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise ModelError(f"cannot load the tokenizer in {folder}: {_diagnosis(folder, error)}") from error


def read_vocabulary(folder: Path, loaded: LoadedTokenizer | None = None) -> str:
    """Return what a tokenizer.json of the folder says: the file, or one made of the folder's other files.

    Args:
        loaded: the folder's tokenizer, if it is loaded already.

    Raises:
        ModelError: the folder has no tokenizer that can be used.
    """
    path = folder / "tokenizer.json"
    if is_there(path):
        return read_text(path)
    if not has_tokenizer(folder):
        raise ModelError(f"there is no tokenizer in {folder}")
    written: str = (loaded or load_tokenizer(folder)).hf.backend_tokenizer.to_str()
    return written


def token_numbers(folder: Path) -> dict[str, int]:
    """Return the number of each token of a folder's tokenizer, added tokens included.

    Raises:
        ModelError: as `read_vocabulary`, or its tokenizer.json has no vocabulary.
    """
    try:
        document = json.loads(read_vocabulary(folder))
        pieces = document["model"]["vocab"]
        if not isinstance(pieces, dict):
            pieces = {piece: number for number, (piece, *_) in enumerate(pieces)}
        return {**pieces, **{token["content"]: token["id"] for token in document.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: its tokenizer.json has no vocabulary that can be read ({error!r})") from None


def is_of_library(error: BaseException) -> bool:
    """Whether an error may come from transformers or tokenizers: they raise many kinds, and a panic is no Exception."""
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError)


def _load(folder: Path) -> LoadedTokenizer:
    # Imported here, because it takes seconds and only a tokenizer needs it.
    with _IMPORTING:
        from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    for name in _JSON_FILES:
        if is_there(folder / name):
            read_json(folder / name)
    for pattern in _OTHER_FILES:
        for path in folder.glob(pattern):
            read_bytes(path)
    # The tokenizer's class depends on three keys of config.json. transformers would read the whole of it, and
    # allocate what it says.
    document = read_config(folder) if is_there(folder / "config.json") else {}
    keys = ("model_type", "model_name", "tokenizer_class")
    names = {key: document[key] for key in keys if isinstance(document.get(key), str)}
    model_type = names.get("model_type")
    mistral_file = find_mistral_file(folder)
    if mistral_file is not None:
        return load_mistral_file(mistral_file, model_type)
    config: Any = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else PreTrainedConfig()
    names["_name_or_path"] = str(folder)
    for key, name in names.items():
        setattr(config, key, name)
    # transformers would ask at the terminal about foreign code, and hand Mistral's files to a class without a
    # backend.
    options = {"local_files_only": True, "trust_remote_code": False, "mistral_format": False}
    hf: Any = AutoTokenizer.from_pretrained(str(folder), config=config, **options)
    if _uses_file_unchanged(folder) and type(hf) is not PreTrainedTokenizerFast:
        # For some models (Qwen2) AutoTokenizer returns the model's class, which splits words by other rules.
        hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return LoadedTokenizer(hf)


def _uses_file_unchanged(folder: Path) -> bool:
    """Return whether the folder names the class that uses tokenizer.json without changes, or names none at all."""
    config = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        return False
    if not config.is_file():
        return True
    return read_json(config).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


# --- what is wrong with files ----------------------------------------------------------------------------------------


def _diagnosis(folder: Path, error: BaseException) -> str:
    """Say which file and key make the tokenizer fail; the libraries' own errors often do not."""
    path = folder / "tokenizer.json"
    if not is_there(path):
        if is_there(folder / "tokenizer.model") and importlib.util.find_spec("sentencepiece") is None:
            return f"tokenizer.model needs the package sentencepiece: {INSTALL}"
        return f"there is no tokenizer.json: {reason_of(error)}"
    document = read_json(path)
    if "added_tokens" not in document:
        return "tokenizer.json: there is no added_tokens"
    problem = _load_problem(document)
    if problem:
        neutral = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        sections = neutral | {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
        culprit = next((key for key, value in sections.items() if not _load_problem(document | {key: value})), None)
        return f"tokenizer.json: {f'{culprit}: ' if culprit else ''}{problem}"
    config = "tokenizer_config.json" if is_there(folder / "tokenizer_config.json") else "tokenizer.json"
    return f"{config}: {reason_of(error)}"


def _load_problem(document: dict[str, Any]) -> str:
    """Load a tokenizer.json as the library itself does; return its error, or nothing."""
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(document))
    except BaseException as error:
        if not is_of_library(error):
            raise
        return reason_of(error)
    return ""

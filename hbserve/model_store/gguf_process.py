"""Process that converts a GGUF file into a folder in Hugging Face layout.

    python -m hbserve.model_store.gguf_process FILE.gguf FOLDER [float32]

transformers reads the configuration and the tokenizer, the package ``gguf`` the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hbserve.errors import ModelError
from hbserve.model_store.gguf_model import GGUFModel

_IGNORES_MERGES = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Names of ``tokenizer.ggml.pre`` whose tokenizers take a word of the vocabulary whole; transformers does not."""
_PLAIN_SPLITS = ("default", "gpt-2", "smollm")
"""Names of ``tokenizer.ggml.pre`` that split words as GPT-2 does; ``smollm`` splits digits besides."""


def convert(gguf: Path, folder: Path, keep_float32: bool) -> None:
    """Write configuration, weights and tokenizer of a GGUF file into a folder.

    Args:
        keep_float32: write the weights in float32, whatever they are in the file.

    Raises:
        ModelError: HBServe cannot serve what is in the file.
    """
    model = GGUFModel(gguf)
    dtype = "float32" if keep_float32 else model.dtype()
    document = model.config(dtype)
    (folder / "config.json").write_text(json.dumps(document, indent=2))
    _write_tokenizer(gguf, folder, model.metadata("tokenizer.ggml.pre"))
    model.write_weights(folder, document, dtype)


def _write_tokenizer(gguf: Path, folder: Path, split: str | None) -> None:
    """Write the tokenizer.

    Args:
        split: the file's name for the rule by which the tokenizer splits words.
    """
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    path = folder / "tokenizer.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = document["pre_tokenizer"]
    is_plain = isinstance(before, dict) and before["type"] == "ByteLevel"
    if is_plain and split is not None and split not in _PLAIN_SPLITS:
        raise ModelError(f"its tokenizer splits words by the rule {split!r}, which transformers does not know")
    if is_plain and split == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, before]}
    if split in _IGNORES_MERGES:
        document["model"]["ignore_merges"] = True
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Convert; the last line on standard error says why that fails."""
    gguf, folder, *dtype = arguments
    try:
        convert(Path(gguf), Path(folder), keep_float32=dtype == ["float32"])
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

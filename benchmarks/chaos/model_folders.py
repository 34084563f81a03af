"""Malformed model folders: each is a good small one with one or two things broken."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.chaos.mutations import WRONG, mutate, mutate_bytes
from tests.support import tiny_tokenizers
from tests.support.model_zoo import save_model

CONFIG_KEYS = [
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
    *("hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window", "layer_types"),
    *("use_sliding_window", "max_window_layers", "dtype", "torch_dtype", "quantization_config", "compression_config"),
    *("text_config", "auto_map", "eos_token_id", "bos_token_id", "pad_token_id", "initializer_range", "use_cache"),
    *("transformers_version", "tokenizer_class", "id2label", "num_labels", "pretraining_tp", "return_dict"),
]
ROPE_KEYS = [
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    *("partial_rotary_factor", "full_attention"),
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
    {
        **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
]
TOKENIZER_CONFIG_KEYS = [
    *("tokenizer_class", "eos_token", "bos_token", "unk_token", "pad_token", "chat_template", "model_max_length"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "add_bos_token", "auto_map"),
    *("clean_up_tokenization_spaces", "legacy", "add_prefix_space", "backend", "tokenizer_file", "vocab_file"),
]
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
OTHER_FILES = (
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *(
        "merges.txt",
        "vocab.txt",
        "tekken.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "processor_config.json",
    ),
)
"""Files that some tokenizers and weights have besides."""
MODELS = ("llama", "qwen2_window", "qwen3", "mistral", "llama3_rope")


class ModelFolders:
    """Good model folders, and one malformed folder at a time.

    Args:
        folder: where they are made.
    """

    def __init__(self, folder: Path) -> None:
        self._random = random.Random()
        self._target = folder / "malformed"
        self._good = []
        for number, name in enumerate(MODELS):
            save_model(folder / name, name, hidden_size=32, head_dim=16, intermediate_size=24, vocab_size=352)
            self._good.append((tiny_tokenizers.byte_level, tiny_tokenizers.metaspace)[number % 2](folder / name))

    @property
    def good(self) -> list[Path]:
        """The good folders."""
        return self._good

    def make(self, chance: random.Random) -> tuple[str, Path]:
        """Make a malformed folder in place of the last; return what was broken, and the folder."""
        self._random = chance
        shutil.rmtree(self._target, ignore_errors=True)
        good = chance.choice(self._good)
        shutil.copytree(good, self._target)
        kinds = [self._break_config, self._break_tokenizer, self._break_weights, self._break_any_json]
        kinds += [self._break_file, self._add_file]
        return f"{good.name}: {chance.choice(kinds)()}", self._target

    def _wrong(self) -> Any:
        return self._random.choice(WRONG)

    def _write(self, name: str, document: Any) -> None:
        (self._target / name).write_text(json.dumps(document))

    def _break_config(self) -> str:
        name = self._random.choice(["config.json", "config.json", "config.json", "generation_config.json"])
        path = self._target / name
        document = json.loads(path.read_text())
        changes = []
        for _ in range(self._random.choice([1, 1, 2])):
            key = self._random.choice(CONFIG_KEYS)
            if self._random.random() < 0.1:
                document.pop(key, None)
                changes.append(f"without {key}")
            elif key.startswith("rope_") and self._random.random() < 0.8:
                rope = dict(self._random.choice(ROPES))
                inner = self._random.choice(ROPE_KEYS)
                rope[inner] = self._wrong()
                document["rope_parameters"] = rope
                changes.append(f"rope {rope['rope_type']!r:.20}, {inner}={rope[inner]!r:.40}")
            else:
                document[key] = self._wrong()
                changes.append(f"{key}={document[key]!r:.40}")
        self._write(name, document)
        return f"{name}: {', '.join(changes)}"

    def _break_any_json(self) -> str:
        name = self._random.choice(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
        path = self._target / name
        data = path.read_bytes()
        if self._random.random() < 0.3:
            data, change = mutate_bytes(data, self._random)
        else:
            document, change = mutate(json.loads(data), self._random)
            data = json.dumps(document).encode()
        path.write_bytes(data)
        return f"{name}: {change}"

    def _break_tokenizer(self) -> str:
        if self._random.random() < 0.3:
            path = self._target / "tokenizer_config.json"
            document = json.loads(path.read_text())
            key = self._random.choice(TOKENIZER_CONFIG_KEYS)
            document[key] = self._wrong()
            self._write(path.name, document)
            return f"{path.name}: {key}={document[key]!r:.40}"
        document = json.loads((self._target / "tokenizer.json").read_text())
        steps: list[Any] = []
        parent: Any = None
        node = document
        while isinstance(node, dict | list) and node and (parent is None or self._random.random() < 0.7):
            key = self._random.choice(list(node) if isinstance(node, dict) else range(len(node)))
            parent, node = node, node[key]
            steps.append(key)
        if self._random.random() < 0.2:
            del parent[steps[-1]]
            change = "removed"
        else:
            parent[steps[-1]] = self._wrong()
            change = f"{parent[steps[-1]]!r:.40}"
        self._write("tokenizer.json", document)
        return f"tokenizer.json: {steps} {change}"

    def _break_weights(self) -> str:
        path = self._target / "model.safetensors"
        breaks = [self._break_tensor, self._break_header, self._break_index]
        return f"{path.name}: {self._random.choice(breaks)(path)}"

    def _break_tensor(self, path: Path) -> str:
        weights = load_file(path)
        name = self._random.choice(sorted(weights))
        tensor = weights[name]
        others: dict[str, Callable[[], torch.Tensor]] = {
            "nan": lambda: torch.full_like(tensor, float("nan")),
            "one infinity": lambda: tensor.clone().index_fill_(0, torch.tensor([len(tensor) - 1]), float("inf")),
            "transposed": lambda: tensor[None].mT.contiguous(),
            "short": lambda: tensor[:-1].clone(),
            "empty": lambda: tensor[:0].clone(),
            "scalar": lambda: torch.tensor(1.0),
            "integers": lambda: tensor.to(torch.int64),
            "booleans": lambda: tensor.bool(),
            "complex": lambda: tensor.to(torch.complex64),
            "float8": lambda: tensor.to(torch.float8_e4m3fn),
        }
        change = self._random.choice([*others, "missing", "renamed", "all missing"])
        if change in others:
            weights[name] = others[change]()
        else:
            del weights[name]
            if change == "renamed":
                weights[f"{name}2"] = tensor
            elif change == "all missing":
                weights = {}
        save_file(weights, path)
        return f"{name} {change}"

    def _break_header(self, path: Path) -> str:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        name = self._random.choice([name for name in header if name != "__metadata__"])
        change = self._random.choice(["length", "deep", "entry", "entry", "entry", "no JSON", "list"])
        if change == "length":
            data = struct.pack("<Q", self._random.choice([0, 1, 7, 2**20, 2**40, 2**64 - 1])) + data[8:]
        else:
            if change == "entry":
                key = self._random.choice(["dtype", "shape", "data_offsets"])
                header[name][key] = self._random.choice(
                    [*WRONG, [0, 2**62], [-1, 4], [8, 0], [2**33, 2**33], "F32", "XX"]
                )
            texts = {"deep": "[" * 100_000, "no JSON": "{" + "x" * 50, "list": "[1, 2]"}
            text = texts.get(change, json.dumps(header)).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + length :]
        path.write_bytes(data)
        return f"header, {change} {name}"

    def _break_index(self, path: Path) -> str:
        names = list(load_file(path))
        path.rename(self._target / "part.safetensors")
        weight_map: Any = dict.fromkeys(names, "part.safetensors")
        change = self._random.choice(["entry", "map", "document", "outside", "short", "absolute"])
        if change == "entry":
            weight_map[names[0]] = self._wrong()
        elif change in ("outside", "absolute"):
            weight_map[names[0]] = "../llama/model.safetensors" if change == "outside" else "/dev/zero"
        elif change == "short":
            weight_map = {names[0]: "part.safetensors"}
        elif change == "map":
            weight_map = self._wrong()
        document = self._wrong() if change == "document" else {"metadata": self._wrong(), "weight_map": weight_map}
        self._write("model.safetensors.index.json", document)
        return f"index, {change}"

    def _break_file(self) -> str:
        path = self._target / self._random.choice(FILES)
        data = path.read_bytes()
        place = self._random.randrange(len(data))
        contents = {
            "truncated": data[:place],
            "a byte changed": data[:place] + bytes([self._random.randrange(256)]) + data[place + 1 :],
            "a part twice": data[:place] + data[place // 2 :],
            "longer": data + b"\0" * 100,
            "empty": b"",
            "a byte order mark": b"\xef\xbb\xbf" + data,
            "another encoding": data.decode("latin-1").encode("utf-16"),
            "no text": bytes(range(256)) * 4,
            "another type": self._random.choice([b"[]", b"3", b"null", b'"text"', b"NaN", b"{}", b"[{}]"]),
            "deep": b'{"a":' * 100_000,
            "deep and whole": b'{"a":' * 900 + b"1" + b"}" * 900,
            "a huge number": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
        }
        if self._random.random() < 0.7:
            change = self._random.choice(list(contents))
            path.write_bytes(contents[change])
            return f"{path.name} {change}"
        path.unlink()
        return f"{path.name} {'missing' if self._random.random() < 0.2 else self._put_no_file(path)}"

    def _add_file(self) -> str:
        path = self._target / self._random.choice(OTHER_FILES)
        contents = [b"", b"{}", b"[]", b"null", b"\xff\xfe", bytes(range(256)), b'{"a":' * 100_000, b"x" * 1_000_000]
        contents += [b"{{ messages }}", b"{% for %}", b"{{ 1 / 0 }}", b'{"<unk>": 0, "a": -1}', b'{"a": 1e400}']
        if self._random.random() < 0.3:
            return f"{path.name} besides, a {self._put_no_file(path)}"
        content = self._random.choice(contents)
        path.write_bytes(content)
        return f"{path.name} besides: {content!r:.40}"

    def _put_no_file(self, path: Path) -> str:
        what = self._random.choice(["folder", "pipe", "loop", "device", "link to nowhere"])
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": path.name, "device": "/dev/zero", "link to nowhere": "/nowhere"}[what])
        return what

"""Configuration and weights in a GGUF file, for the architectures that HBServe serves.

transformers reads most of the configuration. It leaves out sizes of heads and stretched rotary embeddings, which are
read here. The weights are dequantised one tensor at a time, so a conversion needs little memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from safetensors.torch import save_file
from transformers import AutoConfig

from hbserve.errors import ModelError
from hbserve.model_files import INDEX_FILE, SINGLE_FILE
from hbserve.model_spec import DTYPES, supported_architectures

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies of Llama 3.1 and later."""
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_UNQUANTISED = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}
_MAX_SHARD_BYTES = 2 << 30


class GGUFModel:
    """A model in a GGUF file.

    Raises:
        ModelError: the file is damaged, or holds a model that HBServe does not serve.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # the reader trusts the file, and raises many kinds
            reason = " ".join(str(error).split())
            raise ModelError(f"it is not a whole GGUF file ({reason}); download or write it again") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = self.metadata("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ModelError(f"architecture {self._architecture!r} is not supported; supported are {known}")
        if (self.metadata("split.count") or 1) > 1:
            raise ModelError("it is one part of several; join them with llama-gguf-split --merge")
        for name in ("token_embd.weight", "blk.0.attn_q.weight"):
            if name not in self._tensors:
                raise ModelError(f"it has no tensor {name}")

    def metadata(self, key: str) -> Any:
        """Return a value of the file's metadata, or None."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def dtype(self) -> str:
        """Return the dtype to serve the weights in: that of most of them, and bfloat16 for quantised ones."""
        elements: Counter[str] = Counter()
        for tensor in self._tensors.values():
            elements[_UNQUANTISED.get(tensor.tensor_type, "bfloat16")] += int(tensor.n_elements)
        return elements.most_common(1)[0][0]

    def config(self, dtype: str) -> dict[str, Any]:
        """Return what config.json says."""
        config = AutoConfig.from_pretrained(self._path.parent, gguf_file=self._path.name)
        document: dict[str, Any] = config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            document.pop(key, None)
        model_type = document["model_type"]
        document["architectures"] = [supported_architectures()[model_type]]
        document["dtype"] = dtype
        document["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        document["tie_word_embeddings"] = "output.weight" not in self._tensors
        head_dim = self._own("attention.key_length") or self._own("rope.dimension_count")
        document["head_dim"] = head_dim or document["hidden_size"] // document["num_attention_heads"]
        if model_type != "qwen2":  # its projections always have biases
            document["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
            document["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        ends = [self.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        document["eos_token_id"] = sorted({end for end in ends if end is not None}) or None
        document["rope_parameters"] = {"rope_theta": document["rope_parameters"]["rope_theta"]} | self._rope(document)
        return document

    def write_weights(self, folder: Path, config: dict[str, Any], dtype: str) -> None:
        """Write the weights as safetensors files of at most 2 GiB, and an index if there are several."""
        num_bytes = sum(int(tensor.n_elements) for tensor in self._tensors.values()) * DTYPES[dtype].itemsize
        free_bytes = shutil.disk_usage(folder).free
        if num_bytes > free_bytes:
            what = f"its weights in {dtype} take {num_bytes / 1e9:.1f} GB"
            raise ModelError(f"{what}, and {folder.parent} has {free_bytes / 1e9:.1f} GB; HBSERVE_CACHE names another")
        shards: list[list[str]] = []
        shard: dict[str, torch.Tensor] = {}

        def flush() -> None:
            shards.append([*shard])
            save_file(shard, folder / _shard_name(len(shards)), metadata={"format": "pt"})
            shard.clear()

        size = 0
        for name, tensor in self._weights(config, DTYPES[dtype]):
            if shard and size + tensor.nbytes > _MAX_SHARD_BYTES:
                flush()
                size = 0
            shard[name] = tensor
            size += tensor.nbytes
        flush()
        if len(shards) == 1:
            (folder / _shard_name(1)).rename(folder / SINGLE_FILE)
            return
        places = {name: _shard_name(number) for number, names in enumerate(shards, 1) for name in names}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def _own(self, key: str) -> Any:
        return self.metadata(f"{self._architecture}.{key}")

    def _rope(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return how the rotary embedding is stretched, in transformers' words."""
        kind = self._own("rope.scaling.type") or "none"
        if _ROPE_FREQUENCIES in self._tensors:
            return self._llama3_rope(document)
        if kind == "none":
            return {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise ModelError(f"a rotary embedding of kind {kind!r} is not supported; supported are linear and yarn")
        parameters = {"rope_type": kind, "factor": self._own("rope.scaling.factor")}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = self._own("rope.scaling.original_context_length")
        return parameters

    def _llama3_rope(self, document: dict[str, Any]) -> dict[str, Any]:
        """Find the parameters that give the divisors in the file; published models differ in one of them."""
        divisors = torch.from_numpy(_values(self._tensors[_ROPE_FREQUENCIES]))
        factor = round(float(divisors.max()), 3)
        theta = document["rope_parameters"]["rope_theta"]
        turns = _LLAMA3_ROPE["original_max_position_embeddings"] / (2 * torch.pi)
        turns *= theta ** (-torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
        low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        if not torch.allclose(divisors.double(), expected, rtol=1e-3):
            raise ModelError(f"{_ROPE_FREQUENCIES} holds other numbers than those of Llama 3")
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}

    def _weights(self, config: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in self._tensors.values():
            if tensor.name == _ROPE_FREQUENCIES:
                continue
            weights = torch.from_numpy(_values(tensor))
            if self._architecture in ("llama", "mistral"):
                for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
                    if f".{part}." in tensor.name:
                        weights = _with_halves_apart(weights, config[heads])
            yield _name_of(tensor.name), weights.to(dtype).contiguous()


def _values(tensor: ReaderTensor) -> Any:
    """Return a tensor's values as float32, in an array that may be written."""
    try:
        return dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True)
    except NotImplementedError:
        raise ModelError(f"{tensor.name} is in {tensor.tensor_type.name}, which the package gguf cannot read") from None


def _with_halves_apart(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows: it rotates neighbours, HBServe rotates halves."""
    pairs = weights.reshape(num_heads, weights.shape[0] // num_heads // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _name_of(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is not None and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{kind}"
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    raise ModelError(f"HBServe has no place for the tensor {name}; it serves dense models only")


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"

"""GGUF files of small random models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.support import k_quants

_CONTROL, _BYTE, _NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantization: gguf.GGMLQuantizationType | Sequence[gguf.GGMLQuantizationType] = gguf.GGMLQuantizationType.F32,
    tokenizer: dict[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write a model; matrices in the quantisation, vectors in float32.

    Args:
        quantization: one, or several that the matrices have in turn.
        tokenizer: what `bpe_metadata` or `sentencepiece_metadata` returns.
        metadata: more values, by key with ``__`` for ``.``; those of the architecture without its name.
    """
    config = model.config
    kinds = itertools.cycle(quantization if isinstance(quantization, Sequence) else [quantization])
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in metadata.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        add: Any = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(name, value)
    for key, value in (tokenizer or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
            add(key, value)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and f".{part}." in name:
                values = values.reshape(heads, 2, head_dim // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stem, _, part = name.rpartition(".")
        array = values.contiguous().numpy().astype(np.float32)
        gguf_name = f"{names.get_name(stem)}.{part}"
        if array.ndim == 1:
            writer.add_tensor(gguf_name, array)
        else:
            kind = next(kinds)
            writer.add_tensor(gguf_name, k_quants.quantize(array, kind), raw_dtype=kind)
    frequencies = llama3_frequencies(model)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_frequencies(model: PreTrainedModel) -> Any:
    """Return the divisors of a Llama 3 model's rotary frequencies, from transformers' own; None for other models."""
    parameters = model.config.rope_parameters
    if parameters["rope_type"] != "llama3":
        return None
    own = model.model.rotary_emb.inv_freq
    plain = parameters["rope_theta"] ** (-torch.arange(len(own), dtype=torch.float32) / len(own))
    return (plain / own).numpy().astype(np.float32)


def bpe_metadata(folder: Path, pre: str, size: int, **more: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer.json, padded to a vocabulary of a size."""
    document = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in document["added_tokens"]}
    vocabulary = document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    kinds = [int(_CONTROL if token in special else _NORMAL) for token in tokens]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), size)]
    kinds += [int(gguf.TokenType.UNUSED)] * (size - len(kinds))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **more,
    }


def sentencepiece_metadata(size: int, **more: Any) -> dict[str, Any]:
    """Return the metadata of a small SentencePiece vocabulary with bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [int(gguf.TokenType.UNKNOWN), int(_CONTROL), int(_CONTROL), *[int(_BYTE)] * 256]
    words = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "in", "on", "▁", *"etaoinshrdlucm"]
    tokens += words
    kinds += [int(_NORMAL)] * len(words)
    scores = [0.0] * 259 + [-float(number) for number in range(len(words))]
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(int(gguf.TokenType.UNUSED))
        scores.append(-1e6)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }

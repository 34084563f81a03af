"""An EAGLE-3 head in the numbers that its forward pass needs, and the tensors of its checkpoint.

A head is one decoder layer that guesses the next tokens of a larger model, the target, from that model's own hidden
states (Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test").
Two forms of folders are published: ``LlamaForCausalLMEagle3`` (SafeAILab, SpecForge, AngelSlim), and that of the
library speculators, whose config.json has the layer in ``transformer_layer_config``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.layers.parallel import vocab_shard
from hbserve.model_files import check_sizes, checkpoint_tensors, is_eagle3_head, read_config, shown, whole_number
from hbserve.model_spec import DTYPES, ModelSpec
from hbserve.models.checkpoint_part import CheckpointPart, NumbersPart
from hbserve.models.loader import check_parts, load_parts
from hbserve.models.weights import Sharding, WeightTable

NUM_TAPS = 3
"""Layers of the target whose hidden states a head reads."""

_NAME = "an EAGLE-3 head"
_EMBEDDING, _TOKEN_MAP = "embed_tokens.weight", "d2t"
_HARMLESS = ("t2d", "rotary_emb.inv_freq")
"""Ends of names of tensors that add nothing: ``t2d`` is the inverse of ``d2t``."""
_UNSUPPORTED_FLAGS = ("fc_norm", "norm_output", "parallel_drafting")


@dataclass(frozen=True)
class Eagle3Spec:
    """An EAGLE-3 head.

    Attributes:
        layer: its one layer, as a Llama model with the target's vocabulary and dtype.
        draft_vocab_size: tokens that it can guess.
        tapped_layers: the layers of the target whose inputs it reads, in the order in which it joins them.
        target_hidden_size: of the target's hidden states.
        norm_before_residual: the normed features are the residual, not the features.
        norm_before_fc: the joined hidden states are normed.
        has_embedding: it has an embedding of its own, and does not share the target's.
        has_token_map: its i-th token is the target's token ``i + d2t[i]``, and not the i-th.
    """

    layer: ModelSpec
    draft_vocab_size: int
    tapped_layers: tuple[int, ...]
    target_hidden_size: int
    norm_before_residual: bool
    norm_before_fc: bool
    has_embedding: bool
    has_token_map: bool

    @staticmethod
    def load(folder: str | Path, target: ModelSpec, has_weights: bool = True) -> Eagle3Spec:
        """Read ``config.json`` of a head's folder, and which tensors there are.

        Args:
            target: the model that it guesses for.
            has_weights: False: the folder has no weights, and random ones are wanted.

        Raises:
            ModelError: the folder cannot be read, is no head, or is one for another model; the text says why.
        """
        folder = Path(folder)
        path = folder / "config.json"
        document = read_config(folder)
        if not is_eagle3_head(folder):
            names = shown(document.get("architectures"))
            raise ModelError(f"{path}: architectures {names} is no EAGLE-3 head; a model is for method draft_model")
        layer_document = document.get("transformer_layer_config", document)
        if not isinstance(layer_document, dict):
            raise ModelError(f"{path}: transformer_layer_config must be an object, got {shown(layer_document)}")
        check_sizes(layer_document, path)
        for flag in _UNSUPPORTED_FLAGS:
            if document.get(flag):
                raise ModelError(f"{path}: {flag} {shown(document[flag])} is not supported")
        _check_equal(path, "vocab_size", layer_document.get("vocab_size", target.vocab_size), target.vocab_size)
        if layer_document.get("num_hidden_layers", 1) != 1:
            raise ModelError(f"{path}: heads of {layer_document['num_hidden_layers']} layers are not supported, only 1")
        target_hidden_size = document.get("target_hidden_size") or target.hidden_size
        _check_equal(path, "target_hidden_size", target_hidden_size, target.hidden_size)
        llama = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": target.vocab_size,
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "dtype": str(target.dtype),
        }
        layer = ModelSpec.from_document({**layer_document, **llama}, folder)
        tensors = {_plain(name) for name in checkpoint_tensors(folder)} if has_weights else None
        draft_vocab_size = whole_number(document.get("draft_vocab_size") or target.vocab_size)
        if draft_vocab_size is None or not 1 <= draft_vocab_size <= target.vocab_size:
            wrong = shown(document["draft_vocab_size"])
            raise ModelError(f"{path}: draft_vocab_size must be in 1..{target.vocab_size}, got {wrong}")
        is_same_size = layer.hidden_size == target.hidden_size
        has_embedding = not is_same_size if tensors is None else _EMBEDDING in tensors
        if not has_embedding and not is_same_size:
            sizes = f"hidden_size {layer.hidden_size} is not {target.hidden_size}"
            raise ModelError(f"{path}: {sizes}, so it cannot share the model's embedding, and has no {_EMBEDDING}")
        is_smaller = draft_vocab_size < target.vocab_size
        return Eagle3Spec(
            # published heads state the length of their training, which limits no sequence
            layer=replace(layer, dtype=target.dtype, max_position_embeddings=target.max_position_embeddings),
            draft_vocab_size=draft_vocab_size,
            tapped_layers=_tapped_layers(path, document, target.num_layers),
            target_hidden_size=target.hidden_size,
            norm_before_residual=bool(document.get("norm_before_residual")),
            norm_before_fc=bool(document.get("norm_before_fc")),
            has_embedding=has_embedding,
            has_token_map=is_smaller if tensors is None else is_smaller or _TOKEN_MAP in tensors,
        )

    def as_plain(self) -> dict[str, Any]:
        """Turn the spec into plain data for another process; `from_plain` is the inverse."""
        plain: dict[str, Any] = msgspec.to_builtins(self, enc_hook=lambda dtype: str(dtype).removeprefix("torch."))
        return plain

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Eagle3Spec:
        """Make a spec from the result of `as_plain`."""
        return msgspec.convert(plain, Eagle3Spec, dec_hook=lambda _, name: DTYPES[name])

    def table(self, dtype: torch.dtype, tp_rank: int, tp_size: int) -> WeightTable:
        """Lay out a rank's parameters, see `parameters`."""
        return WeightTable.of_parts(self.parameters(tp_rank, tp_size), dtype)

    def parameters(self, tp_rank: int = 0, tp_size: int = 1) -> dict[str, tuple[CheckpointPart, ...]]:
        """Map each parameter of a rank to the checkpoint's tensors that it is stacked from.

        The layer is shared out as a layer of a model is, embedding and LM head by `vocab_shard`; ``fc`` and norms are
        whole on every rank.

        Raises:
            ModelError: ``tp_size`` ranks cannot share the head evenly.
        """
        layer = self.layer
        hidden, head_dim, inner = layer.hidden_size, layer.head_dim, layer.intermediate_size
        ranks = Sharding(layer, tp_rank, tp_size, has_whole_experts=False)
        q_rows = [head * head_dim for head in ranks.share(layer.num_heads, "num_attention_heads")]
        kv_rows = [head * head_dim for head in ranks.kv_heads()]
        inner_rows = ranks.share(inner, "intermediate_size")
        q_size, kv_size = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
        projections = (("q", q_size, q_rows), ("k", kv_size, kv_rows), ("v", kv_size, kv_rows))
        attention, mlp = "layers.0.self_attn.", "layers.0.mlp."

        def rows(name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> CheckpointPart:
            return CheckpointPart(name, shape, 0, begin, shape[0] if end is None else end)

        parts: dict[str, tuple[CheckpointPart, ...]] = {}
        if self.has_embedding:
            shard = vocab_shard(layer.vocab_size, tp_rank, tp_size)
            parts["embedding"] = (rows(_EMBEDDING, (layer.vocab_size, hidden), *shard),)
        parts["fc"] = (rows("fc.weight", (hidden, NUM_TAPS * self.target_hidden_size)),)
        if self.norm_before_fc:
            parts["fc_norm"] = (rows("input_norm.weight", (NUM_TAPS * self.target_hidden_size,)),)
        parts["embedding_norm"] = (rows("layers.0.input_layernorm.weight", (hidden,)),)
        parts["layers.0.attention_in_norm"] = (rows("layers.0.hidden_norm.weight", (hidden,)),)
        parts["layers.0.qkv"] = tuple(
            rows(f"{attention}{name}_proj.weight", (size, 2 * hidden), *bounds) for name, size, bounds in projections
        )
        if layer.qkv_bias:
            parts["layers.0.qkv_bias"] = tuple(
                rows(f"{attention}{name}_proj.bias", (size,), *bounds) for name, size, bounds in projections
            )
        parts["layers.0.o"] = (CheckpointPart(f"{attention}o_proj.weight", (hidden, q_size), 1, *q_rows),)
        if layer.o_bias:
            parts["layers.0.o_bias"] = (rows(f"{attention}o_proj.bias", (hidden,)),)
        parts["layers.0.mlp_in_norm"] = (rows("layers.0.post_attention_layernorm.weight", (hidden,)),)
        ups = ("gate", "up")
        parts["layers.0.up"] = tuple(rows(f"{mlp}{name}_proj.weight", (inner, hidden), *inner_rows) for name in ups)
        parts["layers.0.down"] = (CheckpointPart(f"{mlp}down_proj.weight", (hidden, inner), 1, *inner_rows),)
        if layer.mlp_bias:
            parts["layers.0.up_bias"] = tuple(rows(f"{mlp}{name}_proj.bias", (inner,), *inner_rows) for name in ups)
            parts["layers.0.down_bias"] = (rows(f"{mlp}down_proj.bias", (hidden,)),)
        parts["final_norm"] = (rows("norm.weight", (hidden,)),)
        shard = vocab_shard(self.draft_vocab_size, tp_rank, tp_size)
        parts["lm_head"] = (rows("lm_head.weight", (self.draft_vocab_size, hidden), *shard),)
        if self.has_token_map:
            size = self.draft_vocab_size
            parts["token_map"] = (NumbersPart(_TOKEN_MAP, (size,), 0, 0, size),)
        return parts

    def load_weights(self, folder: str | Path, table: WeightTable, arena: Tensor, tp_rank: int, tp_size: int) -> None:
        """Copy the head's checkpoint into the arena.

        Raises:
            ModelError: a tensor is missing, of a wrong shape or dtype, has no place in a head, or has a value that
                cannot be used. The text names file and tensor.
        """
        folder = Path(folder)
        renamed = {name: _plain(name) for name in checkpoint_tensors(folder)}
        check_parts(folder, _NAME, self.parameters(), renamed, lambda name: name.endswith(_HARMLESS))
        load_parts(folder, self.parameters(tp_rank, tp_size), renamed, table, arena)
        if self.has_token_map:
            token_ids = target_token_ids(table.views(arena)["token_map"])
            if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.layer.vocab_size:
                raise ModelError(f"{folder}: {_TOKEN_MAP} names tokens that are not in 0..{self.layer.vocab_size - 1}")


def target_token_ids(token_map: Tensor) -> Tensor:
    """Return the target's tokens of a head's tokens: ``i + d2t[i]``."""
    return token_map + torch.arange(len(token_map), device=token_map.device)


def _plain(name: str) -> str:
    """Name a tensor as speculators does, which calls a head's layer ``layers.0``."""
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def _check_equal(path: Path, key: str, value: object, expected: int) -> None:
    if value != expected:
        raise ModelError(f"{path}: it is for another model: {key} is {shown(value)}, and the model has {expected}")


def _tapped_layers(path: Path, document: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers of the target whose inputs the head reads.

    ``eagle_config`` (SpecForge) names the layers whose outputs are read, and the key at the top (speculators, vLLM)
    those whose inputs are. Without either they are those of the published heads.
    """
    key, nested = "eagle_aux_hidden_state_layer_ids", document.get("eagle_config")
    given, is_output = document.get(key), False
    if isinstance(nested, dict) and nested.get(key):
        given, is_output = nested[key], True
    if not given:
        given, is_output = [2, num_layers // 2, num_layers - 3], False
    if not isinstance(given, list) or len(given) != NUM_TAPS or not all(type(layer) is int for layer in given):
        raise ModelError(f"{path}: {key} must be {NUM_TAPS} layers, got {shown(given)}")
    layers = tuple(layer + is_output for layer in given)
    if not all(0 <= layer < num_layers for layer in layers):
        raise ModelError(f"{path}: the head reads inputs of layers {shown(layers)}, and the model has {num_layers}")
    return layers

"""Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025), dense and with a mixture of experts.

The models with images turn heads by three kinds of positions, which are equal in a text. Mellum 2 (JetBrains 2026) is
Qwen3 with experts, and with windows and rotary embeddings by layer.
"""

import dataclasses
from typing import Any

from hbserve.model_families.declaration import Experts, Family


def _experts(config: Any) -> Experts:
    step, dense = max(1, config.decoder_sparse_step), config.mlp_only_layers
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers))
    return Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.moe_intermediate_size,
        is_renormalised=config.norm_topk_prob,
        layers=layers,
    )


def _mellum_experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.moe_intermediate_size,
        is_renormalised=config.norm_topk_prob,
        layers=tuple(kind == "sparse" for kind in config.mlp_layer_types),
    )


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, windows="by_layer")

_EXPERT_KEYS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"),
)

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    qkv_bias="qkv_bias",
    windows="by_layer",
    experts=lambda config: dataclasses.replace(
        _experts(config), shared_size=config.shared_expert_intermediate_size, has_shared_gate=True
    ),
    shared_expert="mlp.shared_expert",
    keys=(*_EXPERT_KEYS, "shared_expert_intermediate_size"),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="by_layer",
)

QWEN2_VL = dataclasses.replace(QWEN2, model_type="qwen2_vl_text", architecture="Qwen2VLTextModel")
QWEN2_5_VL = dataclasses.replace(QWEN2, model_type="qwen2_5_vl_text", architecture="Qwen2_5_VLTextModel")
QWEN3_VL = dataclasses.replace(QWEN3, model_type="qwen3_vl_text", architecture="Qwen3VLTextModel", windows="none")

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="uniform",
    experts=_experts,
    keys=_EXPERT_KEYS,
)

MELLUM = Family(
    "mellum",
    "MellumForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="by_layer",
    has_rope_by_type=True,
    has_draft_layers=True,
    experts=_mellum_experts,
    keys=(
        *("num_local_experts", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "norm_topk_prob", "mlp_layer_types"),
    ),
)

"""GLM-4 (GLM Team 2024): half of each head turns, in neighbouring pairs; the later one has four norms in a layer.

GLM-4.5 (GLM Team 2025) has a mixture of experts after its first layers, Llama's norms, and pairs half of the turning
dimensions apart. Solar Open (Upstage 2025) is GLM-4.5 with experts in all layers.
"""

from typing import Any

from hbserve.model_families.declaration import Experts, Family, LayerNorms


def read_experts(config: Any) -> Experts:
    """Read a mixture with the keys of DeepSeek-V3 (DeepSeek-AI 2024)."""
    return _read_experts(config, config.first_k_dense_replace)


def _read_experts(config: Any, num_dense: int) -> Experts:
    return Experts(
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.moe_intermediate_size,
        is_renormalised=config.norm_topk_prob,
        layers=tuple(layer >= num_dense for layer in range(config.num_hidden_layers)),
        scoring="sigmoid",
        has_bias=True,
        num_groups=config.n_group,
        num_chosen_groups=config.topk_group,
        scale=config.routed_scaling_factor,
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
    )


EXPERT_KEYS = (
    *("n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace"),
)
"""Keys that `read_experts` reads."""


GLM = Family(
    "glm",
    "GlmForCausalLM",
    up=("gate_up_proj",),
    qkv_bias="attention_bias",
    is_partly_rotated=True,
    is_interleaved=True,
)

GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    norms=LayerNorms(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    up=("gate_up_proj",),
    qkv_bias="attention_bias",
    is_partly_rotated=True,
    is_interleaved=True,
)

GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    qk_norm="head",
    qk_norm_key="use_qk_norm",
    qkv_bias="attention_bias",
    is_partly_rotated=True,
    has_draft_layers=True,
    experts=read_experts,
    keys=EXPERT_KEYS,
)

SOLAR_OPEN = Family(
    "solar_open",
    "SolarOpenForCausalLM",
    qkv_bias="attention_bias",
    experts=lambda config: _read_experts(config, num_dense=0),
    keys=tuple(key for key in EXPERT_KEYS if key != "first_k_dense_replace"),
)

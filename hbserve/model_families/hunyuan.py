"""Hunyuan (Tencent 2025), dense and with a mixture of experts: norms of q and k after the rotary embedding.

Hunyuan 3 (2026) has these norms before it, and experts that are chosen by sigmoids with a bias.
"""

from typing import Any

from hbserve.model_families.declaration import Experts, Family


def _experts(config: Any) -> Experts:
    numbers = config.moe_topk if isinstance(config.moe_topk, list) else [config.moe_topk]
    if len({*numbers}) != 1:
        raise ValueError("moe_topk differs by layer")
    return Experts(
        num_experts=config.num_experts,
        num_chosen=numbers[0],
        inner_size=config.intermediate_size,
        is_renormalised=True,
        layers=(True,) * config.num_hidden_layers,
        shared_size=config.intermediate_size,
    )


HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    qk_norm="head",
    qk_norm_names=("query_layernorm", "key_layernorm"),
    has_qk_norm_after_rope=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_rope_alpha=True,
)

HUNYUAN_MOE = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    qk_norm="head",
    qk_norm_names=("query_layernorm", "key_layernorm"),
    has_qk_norm_after_rope=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_rope_alpha=True,
    experts=_experts,
    router="gate.wg",
    shared_expert="mlp.shared_mlp",
    keys=("num_experts", "num_local_experts", "moe_topk", "num_experts_per_tok"),
)


def _experts_v3(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.moe_intermediate_size,
        is_renormalised=True,
        layers=tuple(kind == "sparse" for kind in config.mlp_layer_types),
        scoring="sigmoid",
        has_bias=True,
        scale=config.router_scaling_factor,
        shared_size=config.moe_intermediate_size * config.num_shared_experts,
    )


HUNYUAN_V3 = Family(
    "hy_v3",
    "HYV3ForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_draft_layers=True,
    experts=_experts_v3,
    router="router.gate",
    router_bias="expert_bias",
    shared_expert="mlp.shared_mlp",
    keys=(
        *("num_experts", "num_local_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size"),
        *("router_scaling_factor", "mlp_layer_types"),
    ),
    fixed={"mlp_bias": (False, None)},
)

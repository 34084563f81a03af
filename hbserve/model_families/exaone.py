"""EXAONE 4 (LG AI Research 2025): norms as in OLMo 2; in models with windows, layers without a window do not rotate.

K-EXAONE (2026) has Llama's norms, and the mixture of experts of GLM-4.5.
"""

from typing import Any

from hbserve.model_families.declaration import Experts, Family, LayerNorms


def _rotated_layers(config: Any) -> list[bool]:
    return [config.sliding_window is None or name == "sliding_attention" for name in config.layer_types]


def _experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.moe_intermediate_size,
        is_renormalised=config.norm_topk_prob,
        layers=tuple(kind == "sparse" for kind in config.mlp_layer_types),
        scoring="sigmoid",
        has_bias=True,
        num_groups=config.n_group,
        num_chosen_groups=config.topk_group,
        scale=config.routed_scaling_factor,
        shared_size=config.moe_intermediate_size * config.num_shared_experts,
    )


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    norms=LayerNorms(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
    ),
    qk_norm="head",
    windows="by_layer",
    rotated_layers=_rotated_layers,
    keys=("sliding_window_pattern",),
)

EXAONE_MOE = Family(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    qk_norm="head",
    windows="by_layer",
    rotated_layers=_rotated_layers,
    has_draft_layers=True,
    experts=_experts,
    router_bias="e_score_correction_bias",
    keys=(
        *("sliding_window_pattern", "mlp_layer_types", "first_k_dense_replace"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("num_shared_experts", "n_group", "topk_group", "routed_scaling_factor"),
    ),
)

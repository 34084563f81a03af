"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window in all layers or in none.

Ministral (2024) has windows by layer, Ministral 3 (2025) queries that grow with their positions, and Mixtral (Jiang et
al. 2024) a mixture of experts in every layer. MiniMax-M2 (MiniMax 2025) chooses such experts by sigmoids with a bias,
and has norms of whole projections.
"""

from typing import Any

from hbserve.model_families.declaration import Experts, Family


def _experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.intermediate_size,
        is_renormalised=True,
        layers=(True,) * config.num_hidden_layers,
    )


def _minimax_experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.intermediate_size,
        is_renormalised=True,
        layers=(True,) * config.num_hidden_layers,
        scoring="sigmoid",
        has_bias=True,
    )


MISTRAL = Family("mistral", "MistralForCausalLM", windows="uniform")

MINISTRAL = Family("ministral", "MinistralForCausalLM", windows="by_layer")

MINISTRAL3 = Family("ministral3", "Ministral3ForCausalLM", has_query_growth=True, windows="uniform")

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    mlp="block_sparse_moe",
    up=("w1", "w3"),
    down="w2",
    windows="uniform",
    experts=_experts,
    keys=("num_local_experts", "num_experts", "num_experts_per_tok"),
)

MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    qk_norm="projection",
    mlp="block_sparse_moe",
    up=("w1", "w3"),
    down="w2",
    is_partly_rotated=True,
    has_draft_layers=True,
    experts=_minimax_experts,
    router_bias="e_score_correction_bias",
    keys=("num_local_experts", "num_experts", "num_experts_per_tok", "rotary_dim"),
)

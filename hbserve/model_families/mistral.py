"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window in all layers or in none.

Ministral (2024) has windows by layer, Mixtral (Jiang et al. 2024) a mixture of experts in every layer.
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


MISTRAL = Family("mistral", "MistralForCausalLM", is_uniform=True)

MINISTRAL = Family("ministral", "MinistralForCausalLM")

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    mlp="block_sparse_moe",
    up=("w1", "w3"),
    down="w2",
    is_uniform=True,
    experts=_experts,
    keys=("num_local_experts", "num_experts_per_tok"),
)

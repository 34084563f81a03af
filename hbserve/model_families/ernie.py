"""ERNIE 4.5 (Baidu 2025): Llama with one key for all biases, and neighbouring pairs that turn.

The models with experts have a softmax router with a bias, and one more expert that computes every token.
"""

from typing import Any

from hbserve.model_families.declaration import Experts, Family


def _experts(config: Any) -> Experts:
    first, last, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    layers = (first <= layer <= last and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers))
    return Experts(
        num_experts=config.moe_num_experts,
        num_chosen=config.moe_k,
        inner_size=config.moe_intermediate_size,
        is_renormalised=True,
        layers=tuple(layers),
        has_bias=True,
        shared_size=config.moe_intermediate_size * config.moe_num_shared_experts,
    )


ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    is_interleaved=True,
)

ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    is_interleaved=True,
    has_draft_layers=True,
    experts=_experts,
    router_bias="moe_statics.e_score_correction_bias",
    keys=(
        *("moe_num_experts", "num_experts", "num_local_experts", "moe_k", "num_experts_per_tok"),
        *("moe_intermediate_size", "moe_num_shared_experts"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    ),
    fixed={"use_bias": (False, None), "moe_norm_min": (1e-12,)},
)

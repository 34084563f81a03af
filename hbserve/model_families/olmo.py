"""OLMo 2 (Walsh et al. 2024) and OLMo 3 (2025): norms of what a block adds to the stream, none of what it reads.

OLMoE (Muennighoff et al. 2024) has Llama's norms, and a mixture of experts in every layer. FlexOlmo (Shi et al. 2025)
has the norms of OLMo 2 and such experts.
"""

import dataclasses
from typing import Any

from hbserve.model_families.declaration import Experts, Family, LayerNorms

_NORMS = LayerNorms(
    attention_in=None,
    attention_out="post_attention_layernorm",
    mlp_in=None,
    mlp_out="post_feedforward_layernorm",
)


def _experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.intermediate_size,
        is_renormalised=config.norm_topk_prob,
        layers=(True,) * config.num_hidden_layers,
    )


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    norm="olmo_rms",
    norms=_NORMS,
    qk_norm="projection",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
)

OLMO3 = dataclasses.replace(
    OLMO2, model_type="olmo3", architecture="Olmo3ForCausalLM", windows="by_layer", has_rope_by_type=True
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    qk_norm="projection",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    experts=_experts,
    keys=("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
    fixed={"clip_qkv": (None,)},
)

FLEX_OLMO = dataclasses.replace(
    OLMO2,
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    experts=_experts,
    keys=OLMOE.keys,
)

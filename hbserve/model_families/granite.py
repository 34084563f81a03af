"""Granite 3 (IBM 2024): Llama with four factors (Yang et al. 2022, maximal update parametrisation).

HyperCLOVA X (NAVER 2025) has norms of what a block adds, too, and multiplies the logits where Granite divides.
"""

import dataclasses
from typing import Any

from hbserve.model_families.declaration import Family, LayerNorms, Scales


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.embedding_multiplier,
        residual=config.residual_multiplier,
        attention=config.attention_multiplier,
        logits=1 / config.logits_scaling if config.logits_scaling > 0 else 0.0,
    )


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    scales=_scales,
    keys=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)

HYPERCLOVAX = dataclasses.replace(
    GRANITE,
    model_type="hyperclovax",
    architecture="HyperCLOVAXForCausalLM",
    norms=LayerNorms(attention_out="post_norm1", mlp_out="post_norm2"),
    scales=lambda config: dataclasses.replace(_scales(config), logits=config.logits_scaling),
    fixed={"use_post_norm": (True,)},
)

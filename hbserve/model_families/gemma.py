"""Gemma (Gemma Team 2024): norms with ``1 + weight``, scaled embeddings, and gelu.

Gemma 2 (2024) adds norms of what a block adds to the stream, soft caps, and a sliding window in every second layer.
VaultGemma (2025) is Gemma 2 without these norms. Gemma 3 (2025) has norms of q and k in place of soft caps, and another
rotary embedding in layers with a window.
"""

import dataclasses
from typing import Any

from hbserve.model_families.declaration import Family, LayerNorms, Scales

_NORMS = LayerNorms(
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_CAUSAL = {"use_bidirectional_attention": (None, False)}
_KEYS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.hidden_size**0.5,
        attention=config.query_pre_attn_scalar**-0.5 if config.query_pre_attn_scalar > 0 else 0.0,
        attention_cap=config.attn_logit_softcapping,
        logits_cap=config.final_logit_softcapping,
    )


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    norm="gemma_rms",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    scales=lambda config: Scales(embedding=config.hidden_size**0.5),
    fixed=_CAUSAL,
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    norm="gemma_rms",
    norms=_NORMS,
    activation_key="hidden_activation",
    windows="by_layer",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    scales=_scales,
    keys=_KEYS,
    fixed=_CAUSAL,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    qk_norm="head",
    has_rope_by_type=True,
    scales=lambda config: dataclasses.replace(_scales(config), attention_cap=None),
    keys=(*_KEYS, "sliding_window_pattern", "rope_local_base_freq"),
)

VAULTGEMMA = dataclasses.replace(
    GEMMA2,
    model_type="vaultgemma",
    architecture="VaultGemmaForCausalLM",
    norms=LayerNorms(mlp_in="pre_feedforward_layernorm"),
    fixed={},
)

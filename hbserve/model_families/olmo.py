"""OLMo 2 (Walsh et al. 2024) and OLMo 3 (2025): norms of what a block adds to the stream, none of what it reads."""

from hbserve.model_families.declaration import Family, LayerNorms

_NORMS = LayerNorms(
    attention_in=None,
    attention_out="post_attention_layernorm",
    mlp_in=None,
    mlp_out="post_feedforward_layernorm",
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

OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    norm="olmo_rms",
    norms=_NORMS,
    qk_norm="projection",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_rope_by_type=True,
)

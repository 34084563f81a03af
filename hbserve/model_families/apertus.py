"""Apertus (Swiss AI Initiative 2025): an activation with parameters in each layer, no gate."""

from hbserve.model_families.declaration import Family, LayerNorms

APERTUS = Family(
    "apertus",
    "ApertusForCausalLM",
    norms=LayerNorms(attention_in="attention_layernorm", mlp_in="feedforward_layernorm"),
    qk_norm="head",
    up=("up_proj",),
    is_gated=False,
    curve=("act_fn.alpha_p", "act_fn.alpha_n", "act_fn.beta", "act_fn.eps"),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
)

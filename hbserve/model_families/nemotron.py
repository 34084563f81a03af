"""Families without gate and with squared relu (So et al. 2021).

Nemotron (NVIDIA 2024) has LayerNorm with 1 + weight, and part of a head turns. AFM (Arcee 2025) has the norms of Llama,
Jais 2 (Inception 2025) LayerNorm.
"""

from hbserve.model_families.declaration import Family

NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    norm="layer_1p",
    up=("up_proj",),
    is_gated=False,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    norm_eps_key="norm_eps",
    is_partly_rotated=True,
)

ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    up=("up_proj",),
    is_gated=False,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)

JAIS2 = Family(
    "jais2",
    "Jais2ForCausalLM",
    norm="layer",
    up=("up_proj",),
    is_gated=False,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    norm_eps_key="layer_norm_eps",
)

"""StarCoder2 (Lozhkov et al. 2024): LayerNorm, biases everywhere, a feed-forward layer without gate."""

from hbserve.model_families.declaration import Family

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    norm="layer",
    up=("c_fc",),
    down="c_proj",
    is_gated=False,
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    norm_eps_key="norm_epsilon",
    windows="uniform",
)

"""GLM-4 (GLM Team 2024): half of each head turns, in neighbouring pairs; the later one has four norms in a layer."""

from hbserve.model_families.declaration import Family, LayerNorms

GLM = Family(
    "glm",
    "GlmForCausalLM",
    up=("gate_up_proj",),
    qkv_bias="attention_bias",
    is_partly_rotated=True,
    is_interleaved=True,
)

GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    norms=LayerNorms(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    up=("gate_up_proj",),
    qkv_bias="attention_bias",
    is_partly_rotated=True,
    is_interleaved=True,
)

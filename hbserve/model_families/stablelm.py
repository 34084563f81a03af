"""StableLM (Stability AI 2023): Llama with LayerNorm; part of a head turns."""

from hbserve.model_families.declaration import Family

STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    norm="layer",
    qkv_bias="use_qkv_bias",
    norm_eps_key="layer_norm_eps",
    is_partly_rotated=True,
    fixed={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
)

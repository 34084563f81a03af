"""Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025)."""

from hbserve.model_families.declaration import Family

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
)

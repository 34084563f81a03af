"""dots.llm1 (rednote-hilab 2025): Qwen3's attention, and the mixture of experts of GLM-4.5."""

from hbserve.model_families.declaration import Family
from hbserve.model_families.glm import EXPERT_KEYS, read_experts

DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    qk_norm="head",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="by_layer",
    experts=read_experts,
    keys=EXPERT_KEYS,
)

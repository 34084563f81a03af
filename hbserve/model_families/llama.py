"""Llama (Touvron et al. 2023, Dubey et al. 2024): the layer that all others are compared with.

InternLM 3 (Shanghai AI Laboratory 2025) is Llama with other names. Code World Model (Meta 2025) has no biases in
attention, and windows by layer.
"""

from hbserve.model_families.declaration import Family

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)

INTERNLM3 = Family(
    "internlm3",
    "InternLM3ForCausalLM",
    saved_as="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    keys=("qkv_bias", "bias"),
)

CWM = Family("cwm", "CwmForCausalLM", mlp_bias="mlp_bias", windows="by_layer")

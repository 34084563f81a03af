"""Llama (Touvron et al. 2023, Dubey et al. 2024): the layer that all others are compared with, and its relatives.

InternLM 3 (Shanghai AI Laboratory 2025) and IQuest-Coder (2026) have other names. Code World Model (Meta 2025) has no
biases in attention, and windows by layer. Phi-3 and Phi-4 (Abdin et al. 2024) have stacked matrices in the
checkpoint, and a window in all layers. Helium (Kyutai 2025) turns neighbouring pairs, and has norms that round late.
Seed-OSS (ByteDance 2025) has a key of its own for the bias of the output projection. SmolLM3 (Hugging Face 2025) has
no rotary embedding in every fourth layer.
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

IQUEST_CODER = Family(
    "iquestcoder",
    "IQuestCoderForCausalLM",
    saved_as="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    fixed={"clip_qkv": (None,), "use_sliding_window": (False, None)},
)

CWM = Family("cwm", "CwmForCausalLM", mlp_bias="mlp_bias", windows="by_layer")

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    qkv=("qkv_proj",),
    up=("gate_up_proj",),
    is_partly_rotated=True,
    windows="uniform",
)

HELIUM = Family(
    "helium",
    "HeliumForCausalLM",
    norm="olmo_rms",
    qkv_bias="attention_bias",
    mlp_bias="mlp_bias",
    is_interleaved=True,
)

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_out_bias",
    mlp_bias="mlp_bias",
)

SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="by_layer",
    rotated_layers=lambda config: config.no_rope_layers,
    keys=("no_rope_layers", "no_rope_layer_interval"),
)

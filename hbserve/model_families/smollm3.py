"""SmolLM3 (Hugging Face 2025): Llama without rotary embedding in every fourth layer."""

from hbserve.model_families.declaration import Family

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

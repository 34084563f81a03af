"""Helium (Kyutai 2025): Llama with neighbouring pairs that turn, and norms that round late."""

from hbserve.model_families.declaration import Family

HELIUM = Family(
    "helium",
    "HeliumForCausalLM",
    norm="olmo_rms",
    qkv_bias="attention_bias",
    mlp_bias="mlp_bias",
    is_interleaved=True,
)

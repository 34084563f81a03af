"""Seed-OSS (ByteDance 2025): Llama with a key of its own for the bias of the output projection."""

from hbserve.model_families.declaration import Family

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_out_bias",
    mlp_bias="mlp_bias",
)

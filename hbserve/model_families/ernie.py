"""ERNIE 4.5 (Baidu 2025), the dense models: Llama with one key for all biases, and neighbouring pairs that turn."""

from hbserve.model_families.declaration import Family

ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    is_interleaved=True,
)

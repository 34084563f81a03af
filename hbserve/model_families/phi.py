"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with stacked matrices in the checkpoint, and a window in all layers."""

from hbserve.model_families.declaration import Family

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    qkv=("qkv_proj",),
    up=("gate_up_proj",),
    is_partly_rotated=True,
    windows="uniform",
)

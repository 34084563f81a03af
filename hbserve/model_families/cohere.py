"""Command R (Cohere 2024): attention and the feed-forward layer side by side, after one norm.

Command R7B and Command A (Cohere 2025) have windows by layer; layers without a window do not rotate.
"""

from typing import Any

from hbserve.model_families.declaration import Family, LayerNorms, Scales


def _scales(config: Any) -> Scales:
    return Scales(logits=config.logit_scale)


COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    norm="plain_layer",
    norms=LayerNorms(mlp_in=None),
    norm_eps_key="layer_norm_eps",
    is_parallel=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    is_interleaved=True,
    qk_norm="own",
    qk_norm_key="use_qk_norm",
    scales=_scales,
    keys=("logit_scale",),
)

COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    norm="plain_layer",
    norms=LayerNorms(mlp_in=None),
    norm_eps_key="layer_norm_eps",
    is_parallel=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    is_interleaved=True,
    windows="by_layer",
    rotated_layers=lambda config: [name == "sliding_attention" for name in config.layer_types],
    scales=_scales,
    keys=("logit_scale", "sliding_window_pattern"),
)

"""EXAONE 4 (LG AI Research 2025): norms as in OLMo 2; in models with windows, layers without a window do not rotate."""

from typing import Any

from hbserve.model_families.declaration import Family, LayerNorms


def _rotated_layers(config: Any) -> list[bool]:
    return [config.sliding_window is None or name == "sliding_attention" for name in config.layer_types]


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    norms=LayerNorms(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
    ),
    qk_norm="head",
    rotated_layers=_rotated_layers,
    keys=("sliding_window_pattern",),
)

"""Granite 3 and 4 (IBM 2024, 2025): Llama with four factors (Yang et al. 2022, maximal update parametrisation).

The models with experts have them in all layers, stacked in one tensor. Granite 4's class also has Mamba layers;
models without them (Micro, 1B, 350M) are served. Later ones (2026), with experts or without, have sinks, and windows by
layer. HyperCLOVA X (NAVER 2025) has norms of what a block adds, too, and multiplies the logits where Granite divides.
"""

import dataclasses
from typing import Any

from hbserve.errors import ModelError
from hbserve.model_families.declaration import Experts, Family, LayerNorms, Scales


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.embedding_multiplier,
        residual=config.residual_multiplier,
        attention=config.attention_multiplier,
        logits=1 / config.logits_scaling if config.logits_scaling > 0 else 0.0,
    )


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    scales=_scales,
    keys=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)


def _rotated_layers(config: Any) -> list[bool]:
    if not {*config.layer_rope_theta} <= {0, config.rope_parameters["rope_theta"]}:
        raise ModelError("layer_rope_theta with other values than 0 and rope_theta is not supported")
    return [theta != 0 for theta in config.layer_rope_theta]


GRANITE_SWA = dataclasses.replace(
    GRANITE,
    model_type="granite_swa",
    architecture="GraniteSWAForCausalLM",
    has_sinks=True,
    windows="by_layer",
    rotated_layers=_rotated_layers,
    keys=(*GRANITE.keys, "layer_rope_theta"),
)


def _experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.intermediate_size,
        is_renormalised=True,
        layers=(True,) * config.num_hidden_layers,
    )


GRANITE_MOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    mlp="block_sparse_moe",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    scales=_scales,
    experts=_experts,
    router="router.layer",
    stacked_experts=("input_linear.weight", "output_linear.weight"),
    keys=(*GRANITE.keys, "num_local_experts", "num_experts_per_tok"),
)

GRANITE_MOE_SHARED = dataclasses.replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    experts=lambda config: dataclasses.replace(_experts(config), shared_size=config.shared_intermediate_size),
    shared_expert="shared_mlp",
    shared_matrices=(("input_linear",), "output_linear"),
    keys=(*GRANITE_MOE.keys, "shared_intermediate_size"),
)

GRANITE_MOE_SWA = dataclasses.replace(
    GRANITE_MOE_SHARED,
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    router="router",
    stacked_experts=("experts.gate_up_proj", "experts.down_proj"),
    has_sinks=True,
    windows="by_layer",
    rotated_layers=_rotated_layers,
    keys=(*GRANITE_MOE_SHARED.keys, "layer_rope_theta"),
)

GRANITE_4 = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    mlp="shared_mlp",
    up=("input_linear",),
    down="output_linear",
    width_key="shared_intermediate_size",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    rotated_layers=lambda config: [config.position_embedding_type == "rope"] * config.num_hidden_layers,
    scales=_scales,
    keys=(*GRANITE.keys, "position_embedding_type", "layers_block_type"),
    fixed={"num_local_experts": (0,)},
)

HYPERCLOVAX = dataclasses.replace(
    GRANITE,
    model_type="hyperclovax",
    architecture="HyperCLOVAXForCausalLM",
    norms=LayerNorms(attention_out="post_norm1", mlp_out="post_norm2"),
    scales=lambda config: dataclasses.replace(_scales(config), logits=config.logits_scaling),
    fixed={"use_post_norm": (True,)},
)

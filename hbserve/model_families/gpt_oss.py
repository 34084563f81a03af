"""gpt-oss (OpenAI 2025): a mixture of experts with biases, sinks in every head, windows in every second layer."""

from typing import Any

from hbserve.model_families.declaration import Experts, Family


def _experts(config: Any) -> Experts:
    return Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        inner_size=config.intermediate_size,
        is_renormalised=True,
        layers=(True,) * config.num_hidden_layers,
    )


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    norm="olmo_rms",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    activation="clamped_swiglu",
    has_sinks=True,
    windows="by_layer",
    experts=_experts,
    router="router",
    stacked_experts=("experts.gate_up_proj", "experts.down_proj"),
    has_expert_biases=True,
    keys=("num_local_experts", "num_experts", "num_experts_per_tok"),
    fixed={"swiglu_limit": (7.0, None), "swiglu_alpha": (1.702, None)},
)

"""Tiny random models of every supported architecture, written to disk in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

# on busy cores more threads than one wait for each other longer than tiny tensors take
torch.set_num_threads(1)
logging.disable_progress_bar()

VOCAB_SIZE = 320

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GRANITE_FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.125,
    "logits_scaling": 4.0,
}
_GRANITE_WINDOWS = {
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "layer_rope_theta": [10000.0, 0, 10000.0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 16,
    "original_max_position_embeddings": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

HEAD_TAPS = [0, 1, 2]
"""Layers of the tiny models whose inputs a tiny EAGLE-3 head reads."""

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_head256": {
        "model_type": "qwen3",
        "head_dim": 256,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "rope_parameters": _YARN_ROPE,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "mlp_only_layers": [1],
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 1,
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "attention_bias": True,
    },
    "glm4_moe_groups": {
        "model_type": "glm4_moe",
        "num_experts_per_tok": 3,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
        "first_k_dense_replace": 2,
        "use_qk_norm": True,
        "head_dim": 32,
    },
    "dots1": {
        "model_type": "dots1",
        "head_dim": 32,
        "num_experts_per_tok": 2,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
    "olmoe": {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"model_type": "llama", "num_attention_heads": 8, "head_dim": 64, "rope_parameters": _LLAMA3_ROPE},
    "llama_linear_rope": {
        "model_type": "llama",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "head_dim": 48, "sliding_window": 24},
    "mistral_full": {"model_type": "mistral", "head_dim": 80, "sliding_window": None},
    "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "sliding_window": 24,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": False,
    },
    "vaultgemma": {
        "model_type": "vaultgemma",
        "head_dim": 32,
        "sliding_window": 24,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 24,
        "query_pre_attn_scalar": 48,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "tie_word_embeddings": False,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 40},
    "phi3_long": {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + 0.1 * pair for pair in range(8)],
            "long_factor": [2.0 + pair for pair in range(8)],
        },
    },
    "phi3_partial": {"model_type": "phi3", "num_attention_heads": 2, "partial_rotary_factor": 0.75},
    "olmo2": {"model_type": "olmo2", "attention_bias": True, "hidden_act": "relu"},
    "olmo3_long": {
        "model_type": "olmo3",
        "hidden_act": "quick_gelu",
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1 + 0.1 * pair for pair in range(8)],
                "long_factor": [2.0 + pair for pair in range(8)],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": _YARN_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3_with_images": {
        "model_type": "gemma3",
        "text_config": _BASE
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "vision_config": _VISION,
    },
    **{
        name: {
            "model_type": name,
            "text_config": _BASE | {"head_dim": 16, "rope_parameters": _MROPE},
            "vision_config": {"depth": 1, "num_heads": 2} | sizes,
        }
        for name, sizes in (
            ("qwen2_vl", {"embed_dim": 32, "hidden_size": 64}),
            ("qwen2_5_vl", {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}),
            ("qwen3_vl", {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}),
        )
    },
    "llava": {
        "model_type": "llava",
        "text_config": _BASE | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    "mistral3": {"model_type": "mistral3", "text_config": _BASE | {"model_type": "mistral"}, "vision_config": _VISION},
    "granite": {
        "model_type": "granite",
        **_GRANITE_FACTORS,
        "tie_word_embeddings": False,
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **_GRANITE_FACTORS,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "granitemoeshared": {
        "model_type": "granitemoeshared",
        **_GRANITE_FACTORS,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 80,
    },
    "granite4": {
        "model_type": "granitemoehybrid",
        **_GRANITE_FACTORS,
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "position_embedding_type": "rope",
        "layer_types": ["attention"] * 3,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "glm": {"model_type": "glm", "head_dim": 32, "attention_bias": True},
    "glm4": {"model_type": "glm4", "head_dim": 32, "attention_bias": True},
    "exaone4": {
        "model_type": "exaone4",
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral": {
        "model_type": "ministral",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "cwm": {
        "model_type": "cwm",
        "mlp_bias": True,
        "bos_token_id": 0,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": _LLAMA3_ROPE,
    },
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"model_type": "ernie4_5", "use_bias": True},
    "helium": {"model_type": "helium", "head_dim": 16, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "starcoder2": {"model_type": "starcoder2", "use_bias": True, "sliding_window": 40, "tie_word_embeddings": True},
    "arcee": {"model_type": "arcee", "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "nemotron": {"model_type": "nemotron", "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "jais2": {"model_type": "jais2", "head_dim": 16},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "hyperclovax": {
        "model_type": "hyperclovax",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "logits_scaling": 0.25,
    },
    "solar_open": {
        "model_type": "solar_open",
        "head_dim": 32,
        "num_experts_per_tok": 2,
        "n_routed_experts": 6,
        "moe_intermediate_size": 48,
        "attention_bias": True,
    },
    "exaone_moe": {
        "model_type": "exaone_moe",
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "num_shared_experts": 1,
    },
    "minimax_m2": {
        "model_type": "minimax_m2",
        "head_dim": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rotary_dim": 16,
    },
    "mellum": {
        "model_type": "mellum",
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "moe_num_shared_experts": 1,
        "tie_word_embeddings": True,
    },
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 32,
        "rope_parameters": _YARN_ROPE | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "hy_v3": {
        "model_type": "hy_v3",
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "attention_bias": True,
    },
    "iquestcoder": {"model_type": "iquestcoder", "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "granite_swa": {
        "model_type": "granite_swa",
        **_GRANITE_FACTORS,
        **_GRANITE_WINDOWS,
    },
    "granitemoe_swa": {
        "model_type": "granitemoe_swa",
        **_GRANITE_FACTORS,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 80,
        **_GRANITE_WINDOWS,
    },
    "apertus": {"model_type": "apertus", "rope_parameters": _LLAMA3_ROPE},
    "internlm3": {"model_type": "internlm3", "head_dim": 16, "qkv_bias": True, "bias": True},
    "cohere": {"model_type": "cohere", "tie_word_embeddings": True, "logit_scale": 0.25},
    "cohere_qk_norm": {
        "model_type": "cohere",
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "logit_scale": 0.25,
    },
    "cohere2": {
        "model_type": "cohere2",
        "tie_word_embeddings": True,
        "logit_scale": 0.25,
        "attention_bias": True,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "hunyuan": {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_moe": {
        "model_type": "hunyuan_v1_moe",
        "head_dim": 32,
        "num_experts": 6,
        "moe_topk": 2,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "rope_parameters": _YARN_ROPE | {"truncate": False},
    },
    "flex_olmo": {
        "model_type": "flex_olmo",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
"""Configurations by name; what is not said is `_BASE`'s."""

# Earlier ones keep the long factors of one kind of layers under another name than they look for.
_HAS_LONGROPE_BY_KIND = Version(transformers.__version__) >= Version("5.23")
MODELS = {
    name: options
    for name, options in MODELS.items()
    if options["model_type"] in CONFIG_MAPPING and (name != "olmo3_long" or _HAS_LONGROPE_BY_KIND)
}
"""The same without those that the installed transformers is too old for."""

_SHARED = (
    *("qwen2_moe", "glm4_moe_groups", "dots1", "phi3_long", "vaultgemma", "arcee", "nemotron", "jais2", "stablelm"),
    *("hyperclovax", "solar_open", "exaone_moe", "minimax_m2", "mellum", "ernie4_5_moe", "flex_olmo", "granitemoe"),
    *("olmoe", "mistral_full", "cwm", "seed_oss", "ernie4_5", "helium", "olmo3_long", "granitemoe_swa"),
    *("hy_v3", "iquestcoder", "granite_swa", "apertus", "ministral3", "internlm3", "cohere", "hunyuan", "hunyuan_moe"),
    *("granitemoeshared", "granite4", "gemma3_with_images", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    "cohere_qk_norm",
)
OWN_ATTENTION = [name for name in MODELS if name not in _SHARED]
"""Models that do not share all of their attention with another one here."""


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The random model of that name.

    Its weights are wide (standard deviation 0.3) and its norms and biases random: a narrow one
    repeats one token, and then a corrupted KV cache goes unseen.
    """
    options = _BASE | MODELS[name] | changes
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    generator = torch.Generator().manual_seed(1234)
    # With a soft cap, some versions of transformers choose torch's attention, which has none.
    kernel = {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}
    auto_class = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=dtype, **kernel).eval()
    with torch.no_grad():
        biases = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
        for parameter_name, parameter in [*model.named_parameters(), *biases]:
            center = 1.0 if parameter_name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + center)
    return model


def save_model(folder: Path, name: str, sharded: bool = False, **changes: Any) -> PreTrainedModel:
    """Write the model to a folder and return it; ``sharded`` spreads it over several files."""
    model = make_model(name, **changes)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    return model


def save_head(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Save a random EAGLE-3 head, as SpecForge does; returns its tensors.

    It can guess the tokens whose number divided by 8 leaves at most 4.

    Args:
        config: of config.json, where it is not for the tiny models.
    """
    document: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **_BASE,
        "head_dim": 16,
        "num_hidden_layers": 1,
        "eagle_aux_hidden_state_layer_ids": HEAD_TAPS,
        **config,
    }
    token_ids = torch.tensor([token for token in range(document["vocab_size"]) if token % 8 < 5])
    document = {"draft_vocab_size": len(token_ids), **document}
    hidden, inner, head_dim = (document[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = (document[key] * head_dim for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "fc": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": (q, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, q),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (len(token_ids), hidden),
    }
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{name}.weight": torch.empty(shape).normal_(0, 0.15, generator=generator) for name, shape in shapes.items()
    }
    for name in ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = torch.ones(hidden)
    t2d = torch.zeros(document["vocab_size"], dtype=torch.bool)
    t2d[token_ids] = True
    tensors |= {"d2t": token_ids - torch.arange(len(token_ids)), "t2d": t2d}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")
    return tensors

"""What the ``quantization_config`` of well-known FP8 checkpoints says. Each is read, or refused by name.

The documents are shortened copies of published ones: of lists of modules a few entries are left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbserve.errors import ModelError
from hbserve.model_files import read_config
from hbserve.weight_format import Fp8Format, read_weight_format

BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
BLOCK_FORMAT = Fp8Format("block", scale_name="weight_scale_inv")
NUMBERS = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
MODELOPT_NUMBERS = {"dynamic": False, "num_bits": 8, "type": "float"}


def llm_compressor(weights: str, inputs: str | None, *ignore: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it, by the strategies of weights and inputs."""
    is_static = inputs == "tensor"
    group: dict[str, Any] = {
        "input_activations": None if inputs is None else NUMBERS | {"strategy": inputs, "dynamic": not is_static},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": NUMBERS | {"strategy": weights, "dynamic": False, "observer": "minmax"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | more


def modelopt(algorithm: str, *ignore: str) -> dict[str, Any]:
    """As NVIDIA's Model Optimizer writes it to config.json."""
    group = {"input_activations": MODELOPT_NUMBERS, "weights": MODELOPT_NUMBERS, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "quant_algo": algorithm,
        "kv_cache_scheme": MODELOPT_NUMBERS,
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quant_method": "modelopt",
    }


_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKENS = _FLOAT8 | {"strategy": "token", "dynamic": True}
LINEAR = {"targets": ["Linear"], "weights": _FLOAT8, "input_activations": _TOKENS}
INT8 = LINEAR | {"weights": _FLOAT8 | {"type": "int"}, "input_activations": _TOKENS | {"type": "int"}}
INT4 = {
    "targets": ["re:.*mlp.*"],
    "weights": _FLOAT8 | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "input_activations": None,
    "format": "pack-quantized",
}
MXFP8 = LINEAR | {"format": "mxfp8-quantized"}


def is_converted(config: dict[str, Any], *modules: str) -> list[bool]:
    weight_format = read_weight_format({"quantization_config": config})
    assert weight_format is not None
    return [weight_format.converts(f"model.layers.{module}") for module in modules]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(BLOCKS, BLOCK_FORMAT, id="deepseek-ai/DeepSeek-V3"),
        pytest.param(
            BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]},
            BLOCK_FORMAT,
            id="Qwen/Qwen3-8B-FP8",
        ),
        pytest.param(
            BLOCKS | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
            Fp8Format("block", scale_name="weight_scale_inv", plain_modules=("gate", "e_score_correction_bias")),
            id="MiniMaxAI/MiniMax-M2",
        ),
        pytest.param(
            llm_compressor(
                "tensor", "tensor", "lm_head", kv_cache_scheme=NUMBERS | {"strategy": "tensor", "dynamic": False}
            ),
            Fp8Format("tensor", is_static=True),
            id="RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8, with kv_cache_scheme",
        ),
        pytest.param(
            llm_compressor("channel", "token", "lm_head"),
            Fp8Format("channel"),
            id="RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        ),
        pytest.param(
            {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},
            Fp8Format("tensor", is_static=True),
            id="AutoFP8",
        ),
        pytest.param(
            {
                "activation_scheme": "static",
                "dequantize": False,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
                "quant_method": "fp8",
                "weight_block_size": None,
            },
            Fp8Format("tensor", is_static=True, plain_modules=("model.vision_tower", "model.multi_modal_projector")),
            id="mistralai/Devstral-Small-2-24B-Instruct-2512",
        ),
        pytest.param(modelopt("FP8", "lm_head"), Fp8Format("tensor", is_static=True), id="nvidia FP8"),
        pytest.param(
            modelopt("FP8_PER_CHANNEL_PER_TOKEN", "lm_head"), Fp8Format("channel"), id="nvidia FP8 per channel"
        ),
        pytest.param(
            {
                "activation_scale_ub": 1200.0,
                "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"],
                "quant_method": "fbgemm_fp8",
            },
            Fp8Format("channel", plain_modules=("model.layers.0.mlp.down_proj",), max_input=1200.0),
            id="meta-llama/Llama-3.1-405B-Instruct-FP8",
        ),
    ],
)
def test_published_documents_are_read(config: dict[str, Any], expected: Fp8Format) -> None:
    assert read_weight_format({"quantization_config": config}) == expected


def test_routers_of_experts_stay_plain() -> None:
    """Qwen3-30B-A3B-FP8 and GLM-4.5-Air-FP8 name them one by one."""
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    for config in (BLOCKS | {"modules_to_not_convert": names}, llm_compressor("channel", "token", *names)):
        converted = is_converted(config, "0.mlp.gate", "1.mlp.gate", "1.mlp.gate_proj", "0.mlp.experts.7.gate_proj")
        assert converted == [False, False, True, True]


@pytest.mark.parametrize(
    "names",
    [
        ["language_model.model.layers.0.mlp.down_proj", "language_model.lm_head"],
        ["model.language_model.layers.0.mlp.down_proj"],
        [r"re:language_model\.model\.layers\.0\.mlp\.down_proj", "re:vision_tower.*"],
        [r"re:model\.language_model\.layers\.0\.mlp\.down.*", "re:.*lm_head"],
        [r"re:.*layers\.0\.mlp\.down_proj", "visual.blocks.0.mlp.down_proj"],
    ],
)
def test_modules_are_named_as_checkpoints_with_images_name_them(names: list[str]) -> None:
    modules = "0.mlp.down_proj", "1.mlp.down_proj", "0.mlp.up_proj"
    assert is_converted(llm_compressor("channel", "token", *names), *modules) == [False, True, True]
    targeted = llm_compressor("channel", "token")
    targeted["config_groups"]["group_0"]["targets"] = names
    assert is_converted(targeted, *modules) == [True, False, False]


def test_wildcards_of_modelopt() -> None:
    config = modelopt("FP8", "lm_head*", "language_model.model.layers.0*", "*.mlp.gate", "model.layers.2.self_attn*")
    modules = "0.mlp.up_proj", "1.mlp.gate", "2.self_attn.q_proj", "1.mlp.gate_proj", "2.mlp.up_proj"
    assert is_converted(config, *modules) == [False, False, False, True, True]


def test_modelopts_own_file_is_read_where_config_json_says_nothing(tmp_path: Path) -> None:
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "layers.1.mlp"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    (tmp_path / "config.json").write_text("{}")
    expected = Fp8Format("tensor", is_static=True, plain_modules=("layers.1.mlp",))
    assert read_weight_format(read_config(tmp_path)) == expected
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    assert read_weight_format(read_config(tmp_path)) == BLOCK_FORMAT
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert read_weight_format(read_config(tmp_path)) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BLOCKS | {"scale_fmt": "ue8m0"}, 'fp8: scale_fmt "ue8m0" is not supported; supported are'),  # DeepSeek-V3.1
        (modelopt("NVFP4"), 'modelopt: quant_algo "NVFP4" is not supported; supported are'),
        (modelopt("FP8_PB_WO"), 'modelopt: quant_algo "FP8_PB_WO"'),
        (modelopt("FP8", "a*b*c*d*e*f"), "may take too long to match"),
        (llm_compressor("group", "token"), 'strategy "group"'),
        (llm_compressor("channel", "tensor_group"), 'strategy "tensor_group"'),
        (
            llm_compressor("channel", "token", config_groups={"a": LINEAR, "b": LINEAR}),
            "several groups have the target",
        ),
        (
            llm_compressor("channel", "token", format="mixed-precision", config_groups={"a": LINEAR, "b": INT4}),
            'compressed-tensors: format "pack-quantized" is not supported',
        ),
        (llm_compressor("channel", "token", config_groups={"a": INT8}), 'compressed-tensors: type "int"'),
        (llm_compressor("channel", "token", config_groups={"a": MXFP8}), 'format "mxfp8-quantized"'),
        (llm_compressor("channel", "token", format="nvfp4-pack-quantized"), 'format "nvfp4-pack-quantized"'),
        (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": "1200"},
            "activation_scale_ub must be a positive number",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 'quant_method "awq"'),
        ({"quant_method": "gptq", "bits": 4, "sym": True}, 'quant_method "gptq"'),
        (llm_compressor("channel", "token", transform_config={"config_groups": {"u": {}}}), "transform_config"),
        ({"quant_method": "quark"}, 'quant_method "quark"'),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 'quant_method "bitsandbytes"'),
    ],
)
def test_other_documents_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_weight_format({"quantization_config": config})


def test_targets_that_are_other_classes_are_refused_by_name() -> None:
    config = llm_compressor("channel", "token")
    config["config_groups"]["group_0"]["targets"] = ["LlamaMLP"]
    with pytest.raises(ModelError, match="compressed-tensors: the class LlamaMLP in targets is not supported"):
        read_weight_format({"quantization_config": config})

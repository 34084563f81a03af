"""FP8 checkpoints as they are published, made of a small model; and transformers' model with the same numerics.

The numerics are written down a second time here, from the formats' definitions and without HBServe's code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

MODULES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
_PEAK = 448.0
BOUND = 3.0
"""Upper bound of the inputs of fbgemm's format; published ones have 1200, which these models do not reach."""


def group_of(strategy: str, is_static: bool, *targets: str) -> dict[str, Any]:
    """One of ``config_groups`` that llm-compressor writes."""
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {"strategy": "tensor" if is_static else "token", "dynamic": not is_static, **numbers}
    weights = {"strategy": strategy, "dynamic": False, **numbers}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
        inputs |= {"strategy": "group", "group_size": 128}
    return {"targets": list(targets), "weights": weights, "input_activations": inputs}


def compressed_tensors(strategy: str, is_static: bool, **options: Any) -> dict[str, Any]:
    """The ``quantization_config`` that llm-compressor writes."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group_of(strategy, is_static, "Linear")},
        "ignore": ["lm_head"],
        **options,
    }


FORMATS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "fp8_block": ("block", False, {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
    "fp8_tensor": ("tensor", False, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8_static": ("tensor", True, {"quant_method": "fp8", "activation_scheme": "static"}),
    "hf_static": (
        "tensor",
        True,
        {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None},
    ),
    "ct_channel": ("channel", False, compressed_tensors("channel", False)),
    "ct_tensor_static": ("tensor", True, compressed_tensors("tensor", True)),
    "ct_block": ("block", False, compressed_tensors("block", False)),
    "fbgemm": ("channel", False, {"quant_method": "fbgemm_fp8", "activation_scale_ub": BOUND}),
    "ct_weights_only": (
        "channel",
        False,
        compressed_tensors(
            "channel", False, config_groups={"g": group_of("channel", False, "Linear") | {"input_activations": None}}
        ),
    ),
}
"""What has a scale, whether inputs have static scales, and the ``quantization_config``."""


def make_fp8(folder: Path, model: PreTrainedModel, name: str, plain: tuple[str, ...] = ()) -> None:
    """Turn the checkpoint in a folder into one of `FORMATS`, and the model into one with its numerics.

    Args:
        plain: modules that stay as they are, by their last names.
    """
    granularity, is_static, quantization_config = FORMATS[name]
    key = "ignore" if "config_groups" in quantization_config else "modules_to_not_convert"
    names = [f"re:.*{module}$" if key == "ignore" else module for module in plain]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization_config | {key: [*quantization_config.get(key, []), *names]}
    path.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] not in MODULES or module_name.rpartition(".")[2] in plain:
            continue
        assert isinstance(module, torch.nn.Linear)
        is_hf = name == "hf_static"
        suffixes = (
            "weight_scale_inv" if is_hf or name == "fp8_block" else "weight_scale",
            "activation_scale" if is_hf else "input_scale",
        )
        if name == "ct_weights_only":
            quantise_module(weights, module_name, module, granularity, suffixes)
        else:
            bound = BOUND if name == "fbgemm" else None
            quantise_linear(weights, module_name, module, granularity, suffixes, is_static=is_static, bound=bound)
    save_file(weights, folder / "model.safetensors")


def quantise_module(
    weights: dict[str, Tensor],
    name: str,
    module: torch.nn.Linear,
    granularity: str,
    suffixes: tuple[str, str] = ("weight_scale", "input_scale"),
) -> None:
    """Quantise the weight of a module, in the model and in its checkpoint.

    Args:
        suffixes: names of the scales of weights and of inputs.
    """
    values, scales = quantise_weight(module.weight.data, granularity)
    weights |= {f"{name}.weight": values, f"{name}.{suffixes[0]}": scales}
    module.weight.data = values.float() * spread(scales, values.shape)


def quantise_linear(
    weights: dict[str, Tensor],
    name: str,
    module: torch.nn.Linear,
    granularity: str,
    suffixes: tuple[str, str] = ("weight_scale", "input_scale"),
    *,
    is_static: bool = False,
    bound: float | None = None,
) -> None:
    """Quantise a module with its inputs. Arguments as `quantise_module`.

    Args:
        is_static: scales of inputs are in the checkpoint. Those of k, v and up are smaller than those of q and gate,
            which count for all that read the same inputs.
        bound: of inputs.
    """
    quantise_module(weights, name, module, granularity, suffixes)
    static = torch.tensor([0.5]) if is_static else None
    if static is not None:
        is_smaller = name.rpartition(".")[2] in ("k_proj", "v_proj", "up_proj")
        weights[f"{name}.{suffixes[1]}"] = static * (0.8 if is_smaller else 1)
    group = 128 if granularity == "block" else module.in_features
    module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0], static, group, bound),))


def quantise_weight(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Return values and scales of a matrix."""
    rows, columns = weight.shape
    size = {"tensor": (rows, columns), "channel": (1, columns), "block": (128, 128)}[granularity]
    shape = -(-rows // size[0]), -(-columns // size[1])
    padded = F.pad(weight, (0, shape[1] * size[1] - columns, 0, shape[0] * size[0] - rows))
    peaks = padded.view(shape[0], size[0], shape[1], size[1]).abs().amax((1, 3))
    scales = peaks / _PEAK
    values = (weight / spread(scales, weight.shape)).to(torch.float8_e4m3fn)
    return values, scales.flatten() if granularity == "tensor" else scales


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """One scale for each element, or for each row."""
    if scales.numel() == 1 or scales.shape == (shape[0], 1):
        return scales.reshape(-1, 1)
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def _rounded(x: Tensor, static: Tensor | None, group: int, bound: float | None = None) -> Tensor:
    """The inputs as FP8 has them."""
    parts = []
    clipped = x if bound is None else x.clamp(-bound, bound)
    for part in torch.split(clipped, group, dim=-1):
        scale = part.abs().amax(-1, keepdim=True) / _PEAK if static is None else static
        parts.append((part / scale).clamp(-_PEAK, _PEAK).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, dim=-1)

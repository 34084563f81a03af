"""The formats of weights and of KV. A checkpoint's ``quantization_config`` says in which one its matrices are.

Supported are FP8 weights (e4m3, Micikevicius et al. 2022) in the layouts that published checkpoints have:

| ``quant_method`` | scales of weights | activations |
|---|---|---|
| ``fp8`` | blocks of 128 x 128 (``weight_scale_inv``), per tensor (``weight_scale``) | dynamic, static |
| ``compressed-tensors`` | blocks of 128 x 128, per channel, per tensor (``weight_scale``) | dynamic, static |
| ``modelopt`` | per tensor, per channel (``weight_scale``) | static; dynamic where per channel |
| ``fbgemm_fp8`` | per channel (``weight_scale``) | dynamic |

Experts in MXFP4 are widened while they are loaded (`hbserve.models.mxfp4_experts`). Everything else is refused by its
name. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hbserve.errors import ModelError
from hbserve.model_families.with_images import stored_names, text_name
from hbserve.model_files import shown

BLOCK_SIZE = 128
"""Rows and columns of a block with one scale, and inputs of a token that share one scale there."""

_SUPPORTED = (
    "supported are unquantised weights, and FP8 of quant_method fp8 (per tensor, or blocks of 128 x 128), "
    "compressed-tensors (per tensor, per channel, or blocks of 128 x 128), modelopt (per tensor, per channel) and "
    "fbgemm_fp8"
)
_MAX_PATTERN_LENGTH, _MAX_REPEATS, _MAX_NAMES = 200, 4, 100_000

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class Fp8Format:
    """FP8 weights of the matrices between the embedding and the LM head, which stay as they are.

    Attributes:
        granularity: what has one scale in the checkpoint: a matrix, one of its rows, or a block.
        is_static: the scale of a layer's inputs is in the checkpoint; otherwise each token has its own, computed
            when it is needed (each 128 inputs of a token, where weights have blocks).
        scale_name: name of the scales of a matrix, beside its ``weight``.
        plain_modules: modules that stay unquantised: names, ends or beginnings of names at a dot, or patterns after
            ``re:``.
        targets: the only modules that are quantised, in the same form; empty: all linear layers.
        is_on_load: the checkpoint is not quantised; HBServe quantises while it loads.
    """

    granularity: Granularity
    is_static: bool = False
    scale_name: str = "weight_scale"
    plain_modules: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    is_on_load: bool = False

    def converts(self, module: str) -> bool:
        """Return whether a linear layer has FP8 weights, by its name, such as ``model.layers.0.mlp.up_proj``."""
        return not _is_among(self.plain_modules, module) and (not self.targets or _is_among(self.targets, module))


def _is_among(names: tuple[str, ...], module: str) -> bool:
    """Return whether a module is named: by its name, its beginning or end at a dot, or a pattern after ``re:``."""
    path = f".{module}."
    return any(
        _matches(name[3:], module)
        if name.startswith("re:")
        else path.startswith(f".{name}.") or path.endswith(f".{name}.")
        for name in names
    )


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern matches a module, which has another name in the checkpoint of a model with images."""
    names = stored_names(module) if "language" in pattern else (module,)
    return any(re.match(pattern, name) for name in names)


@dataclass(frozen=True)
class Fp8KV:
    """KV in FP8.

    Attributes:
        scale_names: names, below a layer's, of the scales of keys and of values; None: all scales are 1.
    """

    scale_names: tuple[str, str] | None = None


OTHER_SCALE_NAMES = ((".weight_scale_inv", ".weight_scale"), (".activation_scale", ".input_scale"))
"""Names that transformers gives the scales of whole matrices and of their inputs, and those that are used here."""

KV_SCALE_NAMES = (
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
)
"""Names that checkpoints have for the scales of KV; the last is that of both."""


def on_load(*plain_modules: str) -> Fp8Format:
    """Return the format of ``model.quantization: fp8``: a scale for each row of a matrix and for each token.

    Args:
        plain_modules: see `Fp8Format`.
    """
    return Fp8Format("channel", plain_modules=plain_modules, is_on_load=True)


def read_weight_format(document: dict[str, Any]) -> Fp8Format | None:
    """Read the format from a ``config.json``; None: the weights are not quantised.

    Raises:
        ModelError: the format is not supported; the text names it and what is supported.
    """
    key = "quantization_config" if document.get("quantization_config") else "compression_config"
    config = document.get(key)
    if not config:
        return None
    if not isinstance(config, dict):
        raise ModelError(f"{key} must be an object, got {shown(config)}; {_SUPPORTED}")
    method = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    if method == "fp8":
        return _read_fp8(config)
    if method == "compressed-tensors":
        return _read_compressed_tensors(config)
    if method == "modelopt":
        return _read_modelopt(config)
    if method == "fbgemm_fp8":
        # Its activation_scale_ub clips large inputs for the sake of small ones. Here none are clipped: FP8 is as exact
        # for small numbers as for large ones.
        return Fp8Format("channel", plain_modules=_plain_modules(config, "modules_to_not_convert"))
    if method == "mxfp4":
        return None
    raise ModelError(f"the checkpoint is quantised by quant_method {shown(method)}; {_SUPPORTED}")


def has_mxfp4_experts(document: dict[str, Any]) -> bool:
    """Whether the experts of a checkpoint are in MXFP4, which `read_weight_format` has accepted."""
    config = document.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == "mxfp4"


def _read_fp8(config: dict[str, Any]) -> Fp8Format:
    _expect(config, "fp8", "fmt", "e4m3", "float8_e4m3fn", None)
    _expect(config, "fp8", "scale_fmt", "float", None)
    _expect(config, "fp8", "activation_scheme", "dynamic", "static", None)
    block = config.get("weight_block_size")
    is_static = config.get("activation_scheme") == "static"
    names = _plain_modules(config, "modules_to_not_convert") + _plain_modules(config, "ignored_layers")
    if block is None:
        return Fp8Format("tensor", is_static, plain_modules=names)
    _expect(config, "fp8", "weight_block_size", [BLOCK_SIZE, BLOCK_SIZE])
    if is_static:
        raise ModelError(f"quant_method fp8: blocks with static activations are not supported; {_SUPPORTED}")
    return Fp8Format("block", scale_name="weight_scale_inv", plain_modules=names)


def _read_compressed_tensors(config: dict[str, Any]) -> Fp8Format:
    method = "compressed-tensors"
    _expect(config, method, "format", "float-quantized", "naive-quantized", None)
    sparsity = config.get("sparsity_config") or {}
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise ModelError(f"{method}: sparse weights (sparsity_config) are not supported; {_SUPPORTED}")
    if config.get("transform_config"):
        raise ModelError(f"{method}: transforms of weights (transform_config) are not supported; {_SUPPORTED}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ModelError(f"{method}: config_groups must be an object with one group, got {shown(groups)}; {_SUPPORTED}")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"{method}: a group without weights is not supported; {_SUPPORTED}")
    targets = _modules(group, "targets")
    classes = [name for name in targets if name[:1].isupper() and name != "Linear"]
    if classes:
        raise ModelError(f"{method}: the class {classes[0]} in targets is not supported; {_SUPPORTED}")
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(inputs, dict):
        raise ModelError(f"{method}: weights without quantised activations (W8A16) are not supported; {_SUPPORTED}")
    for part in (weights, inputs):
        _expect(part, method, "num_bits", 8)
        _expect(part, method, "type", "float")
        _expect(part, method, "symmetric", True, None)
    _expect(weights, method, "strategy", "tensor", "channel", "block")
    granularity = weights["strategy"]
    is_static = not inputs.get("dynamic", False)
    if granularity == "block":
        _expect(weights, method, "block_structure", [BLOCK_SIZE, BLOCK_SIZE], f"{BLOCK_SIZE}x{BLOCK_SIZE}")
        _expect(inputs, method, "strategy", "group")
        _expect(inputs, method, "group_size", BLOCK_SIZE)
        _expect(inputs, method, "dynamic", True)
    else:
        _expect(inputs, method, "strategy", "tensor" if is_static else "token")
    return Fp8Format(
        granularity,
        is_static,
        plain_modules=_plain_modules(config, "ignore"),
        targets=() if "Linear" in targets else targets,
    )


def _read_modelopt(config: dict[str, Any]) -> Fp8Format:
    """Read what NVIDIA's Model Optimizer writes: to config.json, or to a file of its own (`read_config` finds it)."""
    _expect(config, "modelopt", "quant_algo", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    is_per_channel = config["quant_algo"] != "FP8"
    names = _plain_modules(config, "ignore") + _plain_modules(config, "exclude_modules")
    plain = tuple(f"re:{'.*'.join(map(re.escape, name.split('*')))}$" if "*" in name else name for name in names)
    _check_patterns(plain, "ignore")
    return Fp8Format("channel" if is_per_channel else "tensor", not is_per_channel, plain_modules=plain)


def _expect(config: dict[str, Any], method: str, key: str, *supported: Any) -> None:
    value = config.get(key)
    if not any(type(value) is type(choice) and value == choice for choice in supported):
        raise ModelError(f"{method}: {key} {shown(value)} is not supported; {_SUPPORTED}")


def _plain_modules(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """Read names of modules that stay unquantised."""
    # The LM head and norms are never FP8; naming them changes nothing, and they would be compared with every module.
    return tuple(name for name in _modules(config, key) if name != "lm_head" and not name.endswith("norm"))


def _modules(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """Read names of modules; patterns must be such that no name takes long to match."""
    names = config.get(key) or []
    if not isinstance(names, list) or len(names) > _MAX_NAMES or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{key} must be a list of names, got {shown(names)}")
    _check_patterns(names, key)
    return tuple(name if name.startswith("re:") else text_name(name) for name in names)


def _check_patterns(names: Iterable[str], key: str) -> None:
    for name in names:
        if name.startswith("re:") and not _is_quick(name[3:]):
            raise ModelError(f"{key}: the pattern {shown(name)} is invalid, or may take too long to match")


def _is_quick(pattern: str) -> bool:
    """Return whether a pattern is valid, short, and has few repeats, none of them of a group or of another repeat."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return False
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    return len(pattern) <= _MAX_PATTERN_LENGTH and repeats <= _MAX_REPEATS and not re.search(r"\)[*+?{]", pattern)

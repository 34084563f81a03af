"""The formats of weights and of KV. A checkpoint's ``quantization_config`` says in which one its matrices are.

Supported are FP8 weights (e4m3, Micikevicius et al. 2022) in the layouts that published checkpoints have:

| ``quant_method`` | scales of weights | activations |
|---|---|---|
| ``fp8`` | blocks of 128 x 128 (``weight_scale_inv``), per tensor (``weight_scale``) | dynamic, static |
| ``compressed-tensors`` | blocks of 128 x 128, per channel, per tensor (``weight_scale``) | dynamic, static, none |
| ``modelopt`` | per tensor, per channel (``weight_scale``) | static; dynamic where per channel |
| ``fbgemm_fp8`` | per channel (``weight_scale``) | dynamic, with an upper bound |

``none``: activations stay as they are, and weights are widened to the serving dtype while they are loaded. So are
experts in MXFP4 (`hbserve.models.mxfp4_experts`). Everything else is refused by its name. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
_MAX_PATTERN_LENGTH, _MAX_REPEATS, _MAX_NAMES, _MAX_GROUPS = 200, 4, 100_000, 16
_GROUP_FORMATS = ("float-quantized", "naive-quantized", None)

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class Fp8Format:
    """FP8 weights of the matrices between the embedding and the LM head.

    Attributes:
        granularity: what has one scale in the checkpoint: a matrix, one of its rows, or a block.
        is_static: the scale of a layer's inputs is in the checkpoint; otherwise each token has its own, computed
            when it is needed (each 128 inputs of a token, where weights have blocks).
        scale_name: name of the scales of a matrix, beside its ``weight``.
        plain_modules: modules that stay unquantised: names, ends or beginnings of names at a dot, or patterns after
            ``re:``.
        targets: the only modules that are quantised, in the same form; empty: all linear layers.
        is_on_load: the checkpoint is not quantised; HBServe quantises while it loads.
        is_widened: the matrices are FP8 in the checkpoint only, and are widened to the serving dtype while they are
            loaded.
        has_head: the LM head is FP8 in the checkpoint, too; it is always widened.
        max_input: bound of inputs, larger ones are clipped to it; None: there is none.
        others: formats of the modules that are not among the targets; the first that has a module is the module's.
    """

    granularity: Granularity
    is_static: bool = False
    scale_name: str = "weight_scale"
    plain_modules: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    is_on_load: bool = False
    is_widened: bool = False
    has_head: bool = False
    max_input: float | None = None
    others: tuple[Fp8Format, ...] = ()

    def of(self, module: str) -> Fp8Format | None:
        """Return the format of a linear layer's weights in the checkpoint; None: they are not quantised.

        Args:
            module: its name, such as ``model.layers.0.mlp.up_proj``.
        """
        if _is_among(self.plain_modules, module):
            return None
        formats = (self, *self.others)
        return next((own for own in formats if not own.targets or _is_among(own.targets, module)), None)

    def converts(self, module: str) -> bool:
        """Return whether a linear layer has FP8 weights when it computes."""
        own = self.of(module)
        return own is not None and not own.is_widened

    @property
    def computes(self) -> bool:
        """Whether any linear layer has FP8 weights when it computes."""
        return not all(own.is_widened for own in (self, *self.others))

    @property
    def name(self) -> str:
        """What has one scale, as in ``channel``; of several formats all, as in ``block+tensor``."""
        return "+".join(sorted({own.granularity for own in (self, *self.others) if not own.is_widened}))

    @property
    def has_input_scales(self) -> bool:
        """Whether the checkpoint has scales of inputs."""
        return any(own.is_static for own in (self, *self.others))

    def with_own_inputs(self) -> Fp8Format:
        """Return the format without scales of inputs in the checkpoint."""
        return replace(self, is_static=False, others=tuple(own.with_own_inputs() for own in self.others))


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
    ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
)
"""Names that checkpoints have for the scales of KV; the last is that of both."""

QUERY_SCALE_NAMES = ("self_attn.q_scale", "self_attn.q_proj.output_scale", "self_attn.prob_output_scale")
"""Names of scales of what is never in FP8 here: queries, and the weights of attention."""


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
        return _read_fbgemm(config)
    if method == "mxfp4":
        return None
    raise ModelError(f"the checkpoint is quantised by quant_method {shown(method)}; {_SUPPORTED}")


def check_kv_scheme(document: dict[str, Any]) -> None:
    """Check that the scales of KV in a checkpoint, if it says that it has any, are those of FP8.

    Raises:
        ModelError: they are not.
    """
    config = document.get("quantization_config") or document.get("compression_config")
    scheme = config.get("kv_cache_scheme") if isinstance(config, dict) else None
    if scheme:
        if not isinstance(scheme, dict):
            raise ModelError(f"kv_cache_scheme must be an object, got {shown(scheme)}")
        _expect(scheme, "kv_cache_scheme", "num_bits", 8)
        _expect(scheme, "kv_cache_scheme", "type", "float")


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
    _expect(config, method, "format", "mixed-precision", *_GROUP_FORMATS)
    sparsity = config.get("sparsity_config") or {}
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise ModelError(f"{method}: sparse weights (sparsity_config) are not supported; {_SUPPORTED}")
    if config.get("transform_config"):
        raise ModelError(f"{method}: transforms of weights (transform_config) are not supported; {_SUPPORTED}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not 1 <= len(groups) <= _MAX_GROUPS:
        raise ModelError(f"{method}: config_groups must be an object of groups, got {shown(groups)}; {_SUPPORTED}")
    # A module that a group names is of that group; the others, those of class Linear, are of the group that says so.
    formats = sorted((_read_group(group) for group in groups.values()), key=lambda own: not own.targets)
    if sum(not own.targets for own in formats) > 1:
        raise ModelError(f"{method}: several groups have the target Linear; {_SUPPORTED}")
    return replace(formats[0], plain_modules=_plain_modules(config, "ignore"), others=tuple(formats[1:]))


def _read_group(group: Any) -> Fp8Format:
    """Read one of compressed-tensors' ``config_groups``."""
    method = "compressed-tensors"
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"{method}: a group without weights is not supported; {_SUPPORTED}")
    _expect(group, method, "format", *_GROUP_FORMATS)
    if group.get("output_activations"):
        raise ModelError(f"{method}: quantised outputs (output_activations) are not supported; {_SUPPORTED}")
    targets = _modules(group, "targets")
    classes = [name for name in targets if name[:1].isupper() and name != "Linear"]
    if classes:
        raise ModelError(f"{method}: the class {classes[0]} in targets is not supported; {_SUPPORTED}")
    weights, inputs = group["weights"], group.get("input_activations")
    if inputs is not None and not isinstance(inputs, dict):
        raise ModelError(f"{method}: input_activations must be an object, got {shown(inputs)}; {_SUPPORTED}")
    for part in (weights, inputs):
        if part is not None:
            _expect(part, method, "num_bits", 8)
            _expect(part, method, "type", "float")
            _expect(part, method, "symmetric", True, None)
    _expect(weights, method, "strategy", "tensor", "channel", "block")
    granularity = weights["strategy"]
    if granularity == "block":
        _expect(weights, method, "block_structure", [BLOCK_SIZE, BLOCK_SIZE], f"{BLOCK_SIZE}x{BLOCK_SIZE}")
    is_static = inputs is not None and not inputs.get("dynamic", False)
    if inputs is not None and granularity == "block":
        _expect(inputs, method, "strategy", "group")
        _expect(inputs, method, "group_size", BLOCK_SIZE)
        _expect(inputs, method, "dynamic", True)
    elif inputs is not None:
        # One scale of all tokens of a step would make a token depend on the others, so each has its own.
        _expect(inputs, method, "strategy", "tensor", *(() if is_static else ("token",)))
    own_targets = () if "Linear" in targets else targets
    return Fp8Format(granularity, is_static, targets=own_targets, is_widened=inputs is None)


def _read_fbgemm(config: dict[str, Any]) -> Fp8Format:
    bound = config.get("activation_scale_ub")
    is_number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (is_number and 0 < bound < math.inf):
        raise ModelError(f"fbgemm_fp8: activation_scale_ub must be a positive number, got {shown(bound)}")
    plain_modules = _plain_modules(config, "modules_to_not_convert")
    return Fp8Format("channel", plain_modules=plain_modules, max_input=None if bound is None else float(bound))


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

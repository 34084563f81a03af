"""A model in the numbers that the forward pass needs, read from its ``config.json``.

Five things differ between the supported families: which projections have a bias, norms of heads, tied embeddings,
sliding windows, and the rotary embedding. `_FAMILIES` holds what ``config.json`` does not state.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from hbserve.errors import ModelError


@dataclass(frozen=True)
class RopeSpec:
    """Parameters of a rotary embedding; `hbserve.layers.rotary` has the formulae.

    Attributes:
        theta: base of the frequencies.
        kind: how the frequencies are stretched for contexts longer than in training.
        factor: by how much.
        low_freq_factor, high_freq_factor: bounds of the blend of ``llama3``.
        original_max_position_embeddings: context length before the stretch, for ``llama3`` and ``yarn``.
        beta_fast, beta_slow: bounds of the blend of ``yarn``, in turns within the original context.
        truncate: the blend of ``yarn`` begins and ends at whole pairs.
        magnitude: factor of cosines and sines (YaRN, section 3.3).
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0


@dataclass(frozen=True)
class _Family:
    """Properties of an architecture that its ``config.json`` does not state.

    Attributes:
        name: transformers' class name.
        qkv_bias: the q, k and v projections always have a bias.
        reads_attention_bias: the key ``attention_bias`` adds a bias to the q, k, v and o projections. The code of
            other architectures ignores this key.
        reads_mlp_bias: the key ``mlp_bias`` adds a bias to the feed-forward layer; other architectures ignore it.
        qk_norm: as in `ModelSpec`.
        is_uniform: all layers have the same attention; transformers ignores ``layer_types``.
    """

    name: str
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    is_uniform: bool = False


_FAMILIES = {
    "qwen3": _Family("Qwen3ForCausalLM", reads_attention_bias=True, qk_norm=True),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": _Family("LlamaForCausalLM", reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": _Family("MistralForCausalLM", is_uniform=True),
}
"""Supported architectures by transformers' ``model_type``."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Serving dtypes by their name in the configuration."""

_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Keys of ``rope_parameters`` that a kind of rotary embedding requires, besides ``rope_theta``."""


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder-only transformer with grouped-query attention and a gated feed-forward layer.

    Attributes:
        architecture: transformers' class name.
        max_position_embeddings: maximum context length, stretched by YaRN where the model uses it.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
        qk_norm: each head of queries and keys has an RMS norm before the rotary embedding.
        tied_embeddings: the LM head is the embedding matrix.
        sliding_windows: per layer, the number of latest tokens that a token sees, itself included; None: all.
        dtype: dtype of the checkpoint.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    dtype: torch.dtype

    @staticmethod
    def load(folder: str | Path) -> ModelSpec:
        """Read ``config.json`` of a model folder.

        Raises:
            ModelError: the file cannot be read, or names something that is not supported.
        """
        path = Path(folder) / "config.json"
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from None
        from transformers import AutoConfig  # takes seconds, and most processes get a ready spec

        try:
            # These checks come first: AutoConfig's message for an unknown model does not say what is supported.
            family = _family(document)
            _refuse_quantised(document)
            try:
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # transformers raises many kinds, some of them bare Exception
                raise ModelError(f"transformers cannot read it: {error}") from error
            return _from_config(family, config)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error.__cause__

    def as_plain(self) -> dict[str, Any]:
        """Turn the spec into plain data for another process; `from_plain` is the inverse."""
        plain: dict[str, Any] = msgspec.to_builtins(self, enc_hook=lambda dtype: str(dtype).removeprefix("torch."))
        return plain

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> ModelSpec:
        """Make a spec from the result of `as_plain`."""
        return msgspec.convert(plain, ModelSpec, dec_hook=lambda _, name: DTYPES[name])


def _family(document: dict[str, Any]) -> _Family:
    supported = ", ".join(family.name for family in _FAMILIES.values())
    model_type, architectures = document.get("model_type"), document.get("architectures")
    if not architectures:
        if model_type not in _FAMILIES:
            raise ModelError(f"model_type {model_type!r} is not supported; supported are {supported}")
        return _FAMILIES[model_type]
    family = next((family for family in _FAMILIES.values() if family.name == architectures[0]), None)
    if family is None:
        raise ModelError(f"architecture {architectures[0]!r} is not supported; supported are {supported}")
    return family


def _refuse_quantised(document: dict[str, Any]) -> None:
    quantization = document.get("quantization_config") or document.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is quantised ({method}); supported are unquantised ones in {', '.join(DTYPES)}"
        )


def _from_config(family: _Family, config: Any) -> ModelSpec:
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act {config.hidden_act!r} is not supported; supported is silu")
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd; the rotary embedding needs an even one")
    if num_heads % config.num_key_value_heads:
        raise ModelError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}"
        )
    attention_bias = family.reads_attention_bias and config.attention_bias
    rope = _rope(config)
    max_positions = config.max_position_embeddings
    if rope.kind == "yarn":  # only some checkpoints state the stretched context here
        max_positions = max(max_positions, int(rope.factor * rope.original_max_position_embeddings))
    return ModelSpec(
        architecture=family.name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.rms_norm_eps),
        max_position_embeddings=max_positions,
        rope=rope,
        qkv_bias=attention_bias or family.qkv_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and config.mlp_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=config.tie_word_embeddings,
        sliding_windows=_sliding_windows(family, config),
        dtype=_dtype(config),
    )


def _rope(config: Any) -> RopeSpec:
    # transformers 5 converts the older keys rope_theta and rope_scaling to rope_parameters
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in _ROPE_PARAMETERS:
        raise ModelError(f"rope_type {kind!r} is not supported; supported are {', '.join(_ROPE_PARAMETERS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported; supported is 1")
    names = _ROPE_PARAMETERS[kind]
    missing = [name for name in names if parameters.get(name) is None]
    if missing:
        raise ModelError(f"rope_type {kind} needs {', '.join(missing)}")
    given = {"theta": parameters["rope_theta"], "kind": kind} | {name: parameters[name] for name in names}
    try:
        if kind == "yarn":
            optional = ("beta_fast", "beta_slow")  # 0 means the default, as in transformers
            given |= {name: parameters[name] for name in optional if parameters.get(name)}
            given["truncate"] = parameters.get("truncate", True)
            given["magnitude"] = _yarn_magnitude(parameters)
        rope = msgspec.convert(given, RopeSpec)  # also turns whole numbers into floats
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ModelError(f"rope parameters: {error}") from None
    if min(rope.theta, rope.factor, rope.original_max_position_embeddings) <= 0:
        raise ModelError("rope parameters: theta, factor and original_max_position_embeddings must be positive")
    return rope


def _yarn_magnitude(parameters: dict[str, Any]) -> float:
    """Compute the factor of cosines and sines: YaRN, section 3.3, with DeepSeek's two coefficients of the logarithm."""

    def magnitude(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(max(1.0, parameters["factor"])) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
    return magnitude(1.0)


def _sliding_windows(family: _Family, config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    full, sliding = "full_attention", "sliding_attention"
    layer_types = getattr(config, "layer_types", None)
    if family.is_uniform:
        # transformers runs all layers alike here, whatever layer_types says
        same = sliding if window is not None else full
        if layer_types is not None and set(layer_types) != {same}:
            raise ModelError(f"layer_types of {family.name} is not supported; sliding_window holds for all layers")
        layer_types = [same] * config.num_hidden_layers
    elif layer_types is None:
        layer_types = [full] * config.num_hidden_layers
    unknown = sorted(set(layer_types) - {full, sliding})
    if unknown:
        raise ModelError(f"layer_types {', '.join(unknown)} not supported; supported are {full}, {sliding}")
    if sliding in layer_types and window is None:
        raise ModelError("layer_types has sliding_attention, but sliding_window is not set")
    return tuple(window if layer_type == sliding else None for layer_type in layer_types)


def _dtype(config: Any) -> torch.dtype:
    dtype = config.dtype if config.dtype is not None else torch.float32
    if dtype not in DTYPES.values():
        raise ModelError(f"dtype {dtype} is not supported; supported are {', '.join(DTYPES)}")
    assert isinstance(dtype, torch.dtype)
    return dtype

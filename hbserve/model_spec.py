"""A model in the numbers that the forward pass needs, read from its ``config.json``.

Five things differ between the supported families: which projections have a bias, norms of heads, tied embeddings,
sliding windows, and the rotary embedding. `_FAMILIES` holds what ``config.json`` does not state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from hbserve.errors import ModelError
from hbserve.model_files import SIZES, checkpoint_tensors, have_equal_bytes, read_config, reason_of, shown, whole_number

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names in a checkpoint of the two tensors that may be tied."""


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


def supported_architectures() -> dict[str, str]:
    """Return transformers' class names of the supported architectures, by ``model_type``."""
    return {model_type: family.name for model_type, family in _FAMILIES.items()}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Serving dtypes by their name in the configuration."""

_SAFETENSORS_DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Serving dtype for weights of a dtype, if config.json names none."""

_ROPE_COEFFICIENTS = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "partial_rotary_factor")

_CONFIG_KEYS = (
    *SIZES,
    *("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)
"""Keys of config.json that the forward pass depends on. The others stay unread: transformers would allocate a name for
each of ``num_labels``, for example."""

_MAX_ROPE_NUMBER = 1e12
"""Bound of all numbers of a rotary embedding: float32 computes with their products."""

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
        folder = Path(folder)
        path = folder / "config.json"
        document = read_config(folder)
        from transformers import CONFIG_MAPPING  # takes seconds, and most processes get a ready spec

        try:
            # These checks come first: transformers' message for an unknown model does not say what is supported.
            model_type, family = _family(document)
            _refuse_quantised(document)
            given = {key: document[key] for key in _CONFIG_KEYS if key in document}
            _check_rope_numbers(given)
            try:
                config = CONFIG_MAPPING[model_type].from_dict(given)
            except Exception as error:  # transformers raises many kinds, some of them bare Exception
                raise ModelError(f"transformers cannot read it: {_first_lines(error)}") from error
            return _from_config(family, config, _dtype(document, folder), _has_tied_head(config, folder))
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


def _family(document: dict[str, Any]) -> tuple[str, _Family]:
    """Find the row of `_FAMILIES`; ``architectures`` and ``model_type`` must agree where both are given."""
    supported = ", ".join(family.name for family in _FAMILIES.values())
    model_type, architectures = document.get("model_type"), document.get("architectures")
    for key, value in (("model_type", [model_type or ""]), ("architectures", architectures or [])):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ModelError(f"{key} {shown(document[key])} is not {'a list of names' if key[0] == 'a' else 'a name'}")
    if not architectures:
        if model_type not in _FAMILIES:
            raise ModelError(f"model_type {model_type!r} is not supported; supported are {supported}")
        return model_type, _FAMILIES[model_type]
    found = next(((kind, family) for kind, family in _FAMILIES.items() if family.name == architectures[0]), None)
    if found is None:
        raise ModelError(f"architecture {architectures[0]!r} is not supported; supported are {supported}")
    if model_type and model_type != found[0]:
        raise ModelError(
            f"architectures names {architectures[0]}, which is of model_type {found[0]!r}, but model_type is "
            f"{model_type!r}; correct the wrong one"
        )
    return found


def _first_lines(error: Exception) -> str:
    """Shorten an error of transformers to one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _refuse_quantised(document: dict[str, Any]) -> None:
    quantization = document.get("quantization_config") or document.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"the checkpoint is quantised ({method}); supported are unquantised ones in {', '.join(DTYPES)}"
        )


def _from_config(family: _Family, config: Any, dtype: torch.dtype, tied_embeddings: bool) -> ModelSpec:
    if config.hidden_act not in ("silu", "swish"):  # two names of one function
        raise ModelError(f"hidden_act {config.hidden_act!r} is not supported; supported is silu")
    sizes = {key: _size(config, key) for key in SIZES if key != "head_dim"}
    num_heads, num_kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if getattr(config, "head_dim", None) is None:
        head_dim = sizes["hidden_size"] // num_heads
    else:
        head_dim = _size(config, "head_dim")
    if head_dim < 2 or head_dim % 2:
        raise ModelError(
            f"head_dim {head_dim} is odd or 0; the rotary embedding needs an even one. Without head_dim it is "
            "hidden_size / num_attention_heads"
        )
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if not 0 <= config.rms_norm_eps <= 1:
        raise ModelError(f"rms_norm_eps must be in [0, 1], got {config.rms_norm_eps}")
    attention_bias = family.reads_attention_bias and config.attention_bias
    rope = _rope(config)
    max_positions = sizes["max_position_embeddings"]
    if rope.kind == "yarn":  # only some checkpoints state the stretched context here
        stretched = int(rope.factor * rope.original_max_position_embeddings)
        max_positions = min(max(max_positions, stretched), SIZES["max_position_embeddings"])
    return ModelSpec(
        architecture=family.name,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.rms_norm_eps),
        max_position_embeddings=max_positions,
        rope=rope,
        qkv_bias=attention_bias or family.qkv_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and config.mlp_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=tied_embeddings,
        sliding_windows=_sliding_windows(family, config),
        dtype=dtype,
    )


def _size(config: Any, key: str) -> int:
    """Read a size; `read_config` has checked it if config.json has it, and else it is transformers' default."""
    value = getattr(config, key)
    if not isinstance(value, int):
        raise ModelError(f"{key} must be an integer, got {shown(value)}")
    return value


def _has_tied_head(config: Any, folder: Path) -> bool:
    """Whether the LM head is the embedding matrix.

    As in transformers 5, a head in the files that differs from the embeddings is the model's own, whatever
    ``tie_word_embeddings`` says. Files that cannot be read are left to the loader.
    """
    if not config.tie_word_embeddings:
        return False
    try:
        tensors = checkpoint_tensors(folder)
        if EMBEDDING not in tensors or LM_HEAD not in tensors:
            return True
        return have_equal_bytes(tensors[EMBEDDING], tensors[LM_HEAD])
    except (ModelError, OSError):
        return True


def _check_rope_numbers(document: dict[str, Any]) -> None:
    """Check the types of rotary parameters, which transformers computes with before it checks them."""
    places: dict[str, Any] = {"": document}
    for key in ("rope_parameters", "rope_scaling"):
        value = document.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{key} must be an object, got {shown(value)}")
        places[f"{key}."] = value or {}
    names = {"rope_theta", *_ROPE_COEFFICIENTS, *(name for names in _ROPE_PARAMETERS.values() for name in names)}
    for prefix, place in places.items():
        for name in sorted(names & set(place)):
            value = place[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and abs(value) <= _MAX_ROPE_NUMBER):  # NaN is not
                raise ModelError(
                    f"{prefix}{name}: rope parameters must be numbers up to {_MAX_ROPE_NUMBER:g}, got {shown(value)}"
                )


def _rope(config: Any) -> RopeSpec:
    # transformers 5 converts the older keys rope_theta and rope_scaling to rope_parameters. Some keys at the top level
    # of config.json are set after it has done so once.
    try:
        if getattr(config, "original_max_position_embeddings", 0) is None:
            del config.original_max_position_embeddings
        config.standardize_rope_params()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"rope_parameters {shown(config.rope_parameters)} cannot be read: {reason_of(error)}"
        ) from None
    parameters = config.rope_parameters
    nested = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if nested:
        raise ModelError(
            f"rope_parameters by layer type ({', '.join(nested)}) are not supported, only one for all layers"
        )
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        raise ModelError(f"rope_type {kind!r} is not supported; supported are {', '.join(_ROPE_PARAMETERS)}")
    if parameters.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ModelError("partial_rotary_factor is not supported; supported is 1")
    names = _ROPE_PARAMETERS[kind]
    missing = [name for name in ("rope_theta", *names) if parameters.get(name) is None]
    if missing:
        raise ModelError(f"rope_type {kind} needs {', '.join(missing)}")
    given = {"theta": parameters["rope_theta"], "kind": kind} | {name: parameters[name] for name in names}
    if kind == "yarn":
        optional = ("beta_fast", "beta_slow")  # 0 means the default, as in transformers
        given |= {name: parameters[name] for name in optional if parameters.get(name)}
        given["truncate"] = parameters.get("truncate", True)
    original = whole_number(given.get("original_max_position_embeddings", 1))
    if original is not None:
        given["original_max_position_embeddings"] = original
    for name, value in given.items():
        if isinstance(value, int | float) and not value > 0 and name != "truncate":
            raise ModelError(f"rope parameters: {name} must be positive, got {value}")
    if kind == "yarn":
        given["magnitude"] = _yarn_magnitude(parameters)
        if given["theta"] <= 1:
            raise ModelError(f"rope parameters: theta must be greater than 1 for yarn, got {given['theta']}")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ModelError("rope parameters: low_freq_factor must be less than high_freq_factor")
    try:
        return msgspec.convert(given, RopeSpec)  # also turns whole numbers into floats
    except msgspec.ValidationError as error:
        raise ModelError(f"rope parameters: {reason_of(error)}") from None


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
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
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(isinstance(layer_type, str) for layer_type in layer_types)
    ):
        raise ModelError(f"layer_types must be a list of names, got {shown(layer_types)}")
    if layer_types is not None and len(layer_types) != config.num_hidden_layers:
        raise ModelError(f"layer_types has {len(layer_types)} entries, num_hidden_layers is {config.num_hidden_layers}")
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
    if sliding in layer_types:
        if window is None:
            raise ModelError("layer_types has sliding_attention, but sliding_window is not set")
        bound = SIZES["max_position_embeddings"]
        if not isinstance(window, int) or not 1 <= window <= bound:
            raise ModelError(f"sliding_window must be in 1..{bound}, or null for none, got {shown(window)}")
    return tuple(window if layer_type == sliding else None for layer_type in layer_types)


def _dtype(document: dict[str, Any], folder: Path) -> torch.dtype:
    """Read the dtype; where config.json leaves it open, the first float tensor of the weights decides."""
    name = document.get("dtype") or document.get("torch_dtype") or "auto"
    if name == "auto":
        try:
            stored = (entry.dtype for entry in checkpoint_tensors(folder).values())
            name = next((_SAFETENSORS_DTYPES[dtype] for dtype in stored if dtype in _SAFETENSORS_DTYPES), "float32")
        except ModelError:  # there are no weights, or the loader will say what is wrong with them
            name = "float32"
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        shown_name = name if isinstance(name, str) else shown(name)
        raise ModelError(f"dtype {shown_name} is not supported; supported are {', '.join(DTYPES)}")
    return dtype

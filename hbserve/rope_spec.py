"""Parameters of rotary embeddings, read from transformers' configuration; `hbserve.layers.rotary` has the formulae."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from hbserve.errors import ModelError
from hbserve.model_families.declaration import Family
from hbserve.model_files import reason_of, shown, whole_number

_ROPE_COEFFICIENTS = (
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "partial_rotary_factor",
    "alpha",
    "llama_4_scaling_beta",
)

_MAX_PAIRS = 1 << 15

_MAX_ROPE_NUMBER = 1e12
"""Bound of all numbers of a rotary embedding: float32 computes with their products."""

_ROPE_LISTS = ("short_factor", "long_factor")

_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Keys of ``rope_parameters`` that a kind of rotary embedding requires, besides ``rope_theta``."""


@dataclass(frozen=True)
class RopeSpec:
    """Parameters of a rotary embedding; `hbserve.layers.rotary` has the formulae.

    Attributes:
        theta: base of the frequencies.
        kind: how the frequencies are stretched for contexts longer than in training.
        factor: by how much.
        pair_factors: for ``longrope``, by how much each pair is stretched.
        low_freq_factor, high_freq_factor: bounds of the blend of ``llama3``.
        original_max_position_embeddings: context length before the stretch, for ``llama3`` and ``yarn``.
        beta_fast, beta_slow: bounds of the blend of ``yarn``, in turns within the original context.
        truncate: the blend of ``yarn`` begins and ends at whole pairs.
        magnitude: factor of cosines and sines (YaRN, section 3.3).
        rotated_dim: number of dimensions of a head that turn, the first ones; None: all.
        is_interleaved: pairs are neighbouring dimensions, not half of the turning ones apart.
        query_growth: b, which makes the queries of position p ``1 + b * log(1 + floor(p / c))`` times as long, for
            ``c = original_max_position_embeddings`` (Llama 4, Meta 2025); 0: they stay as they are.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    pair_factors: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    rotated_dim: int | None = None
    is_interleaved: bool = False
    query_growth: float = 0.0


def check_rope_numbers(document: dict[str, Any]) -> None:
    """Check the types of rotary parameters, which transformers computes with before it checks them."""
    places: dict[str, Any] = {"": document}
    for key in ("rope_parameters", "rope_scaling"):
        value = document.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{key} must be an object, got {shown(value)}")
        places[f"{key}."] = value or {}
        nested = {name: inner for name, inner in (value or {}).items() if isinstance(inner, dict)}
        places |= {f"{key}.{name}.": inner for name, inner in nested.items()}
    names = {
        "rope_theta",
        "rope_local_base_freq",
        *_ROPE_COEFFICIENTS,
        *(name for names in _ROPE_PARAMETERS.values() for name in names),
    }
    for prefix, place in places.items():
        for name in sorted(names & set(place)):
            value = place[name]
            if name in _ROPE_LISTS:
                _check_list(f"{prefix}{name}", value)
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and abs(value) <= _MAX_ROPE_NUMBER):  # NaN is not
                raise ModelError(
                    f"{prefix}{name}: rope parameters must be numbers up to {_MAX_ROPE_NUMBER:g}, got {shown(value)}"
                )


def _check_list(name: str, value: Any) -> None:
    is_list = isinstance(value, list) and len(value) <= _MAX_PAIRS and {*map(type, value)} <= {int, float}
    if value is not None and not (is_list and all(0 < number <= _MAX_ROPE_NUMBER for number in value)):
        raise ModelError(f"{name}: must be a list of positive numbers up to {_MAX_ROPE_NUMBER:g}, got {shown(value)}")


def read_ropes(family: Family, config: Any, head_dim: int, max_model_len: int | None) -> tuple[RopeSpec | None, ...]:
    """Read the rotary embedding of each layer from transformers' ``config``; None: the layer has none.

    Args:
        max_model_len: the longest context that is served; None: the model's own limit.

    Raises:
        ModelError: a parameter is missing, or has a value that is not supported.
    """
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
    num_layers, parameters = config.num_hidden_layers, config.rope_parameters
    if not isinstance(parameters, dict):
        raise ModelError(f"rope_parameters must be an object, got {shown(parameters)}")
    longest = max_model_len or config.max_position_embeddings
    nested = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if family.has_rope_by_type:
        missing = sorted({*config.layer_types} - {*nested})
        if missing:
            raise ModelError(f"rope_parameters has no entry for the layer type {', '.join(missing)}")
        for name in {*config.layer_types}:
            if not parameters[name].get("truncate", True):
                raise ModelError(
                    f"rope_parameters.{name}: truncate false is not supported; transformers does not read it there"
                )
        by_type = {
            name: _rope(family, _with_factor(parameters[name], config), head_dim, longest)
            for name in {*config.layer_types}
        }
        ropes = tuple(by_type[name] for name in config.layer_types)
    elif nested:
        raise ModelError(
            f"rope_parameters by layer type ({', '.join(nested)}) are not supported, only one for all layers"
        )
    else:
        ropes = (_rope(family, _with_factor(parameters, config), head_dim, longest),) * num_layers
    if family.rotated_layers is None:
        return ropes
    is_rotated = family.rotated_layers(config)
    if not (isinstance(is_rotated, list) and {*map(type, is_rotated)} <= {int, bool} and len(is_rotated) >= num_layers):
        raise ModelError(
            f"which layers have a rotary embedding must be a list of {num_layers} times 0 or 1, got {shown(is_rotated)}"
        )
    return tuple(rope if rotated else None for rope, rotated in zip(ropes, is_rotated, strict=False))


def _with_factor(parameters: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
    """Add transformers' default of the factor, where there is none."""
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("factor") is not None or not original:
        return parameters
    return {**parameters, "factor": config.max_position_embeddings / original}


def _rope(family: Family, parameters: Mapping[str, Any], head_dim: int, longest: int) -> RopeSpec:
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        raise ModelError(f"rope_type {kind!r} is not supported; supported are {', '.join(_ROPE_PARAMETERS)}")
    part = parameters.get("partial_rotary_factor") or 1.0
    if part != 1 and not family.is_partly_rotated:
        raise ModelError("partial_rotary_factor is not supported; supported is 1")
    rotated_dim = int(head_dim * part)
    if not 2 <= rotated_dim <= head_dim or rotated_dim % 2:
        raise ModelError(
            f"partial_rotary_factor {part} turns {rotated_dim} of {head_dim} dimensions, not an even number"
        )
    names = _ROPE_PARAMETERS[kind]
    missing = [name for name in ("rope_theta", *names) if parameters.get(name) is None]
    if missing:
        raise ModelError(f"rope_type {kind} needs {', '.join(missing)}")
    if kind == "dynamic":
        # It stretches only sequences longer than max_position_embeddings, and HBServe serves none.
        kind, names = "default", ()
    theta = parameters["rope_theta"]
    if family.has_rope_alpha and parameters["rope_type"] == "dynamic" and parameters.get("alpha"):
        theta *= parameters["alpha"] ** (head_dim / (head_dim - 2))
    given = {"theta": theta, "kind": kind}
    given |= {name: parameters[name] for name in names if name not in _ROPE_LISTS}
    given |= {"is_interleaved": family.is_interleaved, "rotated_dim": None if rotated_dim == head_dim else rotated_dim}
    if kind == "yarn":
        optional = ("beta_fast", "beta_slow")  # 0 means the default, as in transformers
        given |= {name: parameters[name] for name in optional if parameters.get(name)}
        given["truncate"] = parameters.get("truncate", True)
    original = whole_number(given.get("original_max_position_embeddings", 1))
    if original is not None:
        given["original_max_position_embeddings"] = original
    for name, value in given.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise ModelError(f"rope parameters: {name} must be positive, got {value}")
    if kind == "yarn":
        given["magnitude"] = _yarn_magnitude(parameters)
        if family.has_query_growth:
            given["query_growth"] = parameters.get("llama_4_scaling_beta") or 0.0
        if given["theta"] <= 1:
            raise ModelError(f"rope parameters: theta must be greater than 1 for yarn, got {given['theta']}")
    if kind == "longrope":
        given |= _longrope(parameters, given["original_max_position_embeddings"], rotated_dim // 2, longest)
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ModelError("rope parameters: low_freq_factor must be less than high_freq_factor")
    try:
        return msgspec.convert(given, RopeSpec)  # also turns whole numbers into floats
    except msgspec.ValidationError as error:
        raise ModelError(f"rope parameters: {reason_of(error)}") from None


def _longrope(parameters: Mapping[str, Any], original: Any, num_pairs: int, longest: int) -> dict[str, Any]:
    """Choose the factors of pairs (Ding et al. 2024, LongRoPE): all contexts are long if ``longest`` is.

    transformers looks at the longest sequence of a batch instead, so that its keys depend on what is computed together.
    """
    for name in _ROPE_LISTS:
        if len(parameters[name]) != num_pairs:
            raise ModelError(f"rope parameters: {name} must have {num_pairs} numbers, got {len(parameters[name])}")
    if not isinstance(original, int) or original < 2:
        raise ModelError(f"rope parameters: original_max_position_embeddings must be at least 2, got {original}")
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        factor = parameters.get("factor")
        if factor is None:
            raise ModelError("rope_type longrope needs factor or attention_factor")
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = parameters["long_factor" if longest > original else "short_factor"]
    return {"pair_factors": factors, "magnitude": magnitude}


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
    """Compute the factor of cosines and sines: YaRN, section 3.3, with DeepSeek's two coefficients of the logarithm."""

    def magnitude(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(max(1.0, parameters["factor"])) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
    return magnitude(1.0)

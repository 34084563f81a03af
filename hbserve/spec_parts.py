"""Parts of a model's description, read from its ``config.json`` and checked: family, sizes, windows, experts, factors.

`hbserve.model_spec` puts them together. ``config`` is transformers' configuration, which has its defaults.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from hbserve.errors import ModelError
from hbserve.model_families import BY_ARCHITECTURE, FAMILIES, family_of
from hbserve.model_families.declaration import Experts, Family, Scales
from hbserve.model_files import SIZES, reason_of, shown

_Value = TypeVar("_Value")

_MAX_EXPERTS = 1 << 16
"""Bound of the experts of all layers together, since each is three tensors of the checkpoint. The largest published
models have about 40,000."""

_CLASS, _MAX_COMPARED = "ForCausalLM", 100
"""End of most classes' names, and the part of a name that is compared with those of families."""

_MAX_SCALE = 1e6
"""Bound of factors and soft caps: far above every published model, and finite in every dtype's products."""


def find_family(document: dict[str, Any]) -> tuple[str, Family]:
    """Find the family; ``architectures`` and ``model_type`` must agree where both are given."""
    model_type, architectures = document.get("model_type"), document.get("architectures")
    for key, value in (("model_type", [model_type or ""]), ("architectures", architectures or [])):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ModelError(f"{key} {shown(document[key])} is not {'a list of names' if key[0] == 'a' else 'a name'}")
    if not architectures:
        if model_type is None or model_type not in FAMILIES:
            hint = _nearest_family(model_type or "", {name: name for name in FAMILIES})
            raise ModelError(f"model_type {model_type!r} is not supported{hint}. `hbserve models` lists all")
        return model_type, FAMILIES[model_type]
    family = family_of(architectures[0])
    if family is None:
        hint = _nearest_family(architectures[0], {name.removesuffix(_CLASS): name for name in BY_ARCHITECTURE})
        raise ModelError(f"architecture {architectures[0]!r} is not supported{hint}. `hbserve models` lists all")
    other = FAMILIES.get(model_type or "")
    if other is not None and other.saved_as == family.architecture:
        return other.model_type, other
    if model_type and model_type != family.model_type:
        raise ModelError(
            f"architectures names {architectures[0]}, which is of model_type {family.model_type!r}, but model_type is "
            f"{model_type!r}; correct the wrong one"
        )
    return family.model_type, family


def _nearest_family(name: str, by_stem: dict[str, str]) -> str:
    """Return a hint such as ``; the nearest supported one is 'llama'``, or none if no name is near.

    It does not say that the other one is meant: models of a similar name may differ in much.
    """
    name = name[:_MAX_COMPARED]
    misspelt = difflib.get_close_matches(name, by_stem.values(), n=1, cutoff=0.9)
    related = difflib.get_close_matches(name.removesuffix(_CLASS), by_stem, n=1, cutoff=0.6)
    found = [*(by_stem[stem] for stem in related), *misspelt]
    return f"; the nearest supported one is {found[0]!r}" if found else ""


def _read(function: Callable[[Any], _Value], family: Family, config: Any) -> _Value:
    """Call a function of the declaration, which computes with values of any type."""
    try:
        return function(config)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        keys = ", ".join(sorted(family.keys))
        raise ModelError(f"one of {keys} has no usable value: {reason_of(error)}") from None


def has_bias(declared: bool | str, config: Any) -> bool:
    """Whether projections have a bias: as declared, or as the declared key says."""
    return bool(getattr(config, declared)) if isinstance(declared, str) else declared


def read_experts(family: Family, config: Any) -> Experts | None:
    """Read the mixture of experts; None if no layer has experts."""
    if family.experts is None:
        return None
    experts = _read(family.experts, family, config)
    width = SIZES["intermediate_size"]
    for name, value, low, bound in (
        ("number of experts of a layer", experts.num_experts, 1, _MAX_EXPERTS // len(experts.layers)),
        ("number of experts of a token", experts.num_chosen, 1, experts.num_experts),
        ("width of an expert", experts.inner_size, 1, width),
        ("width of the shared expert", experts.shared_size, 0, width),
        ("number of groups of experts", experts.num_groups, 1, experts.num_experts),
        ("number of groups of a token", experts.num_chosen_groups, 1, experts.num_groups),
    ):
        if not isinstance(value, int) or not low <= value <= bound:
            raise ModelError(f"the {name} must be in {low}..{bound}, got {shown(value)}")
    size = experts.num_experts // experts.num_groups
    if experts.num_groups > 1 and (experts.num_experts % experts.num_groups or size < 2):
        raise ModelError(f"{experts.num_experts} experts are not {experts.num_groups} groups of 2 or more")
    if experts.num_chosen > experts.num_chosen_groups * size:
        raise ModelError(
            f"the number of experts of a token must be at most {experts.num_chosen_groups * size}, which its groups "
            f"have, got {experts.num_chosen}"
        )
    if not (
        isinstance(experts.scale, int | float) and math.isfinite(experts.scale) and 0 < experts.scale <= _MAX_SCALE
    ):
        raise ModelError(f"the factor of experts must be positive and at most {_MAX_SCALE:g}, got {experts.scale}")
    return experts if any(experts.layers) else None


def read_scales(family: Family, config: Any, head_dim: int) -> Scales:
    """Read factors and soft caps."""
    scales = _read(family.scales, family, config)
    for name, value in asdict(scales).items():
        if value is not None and not (math.isfinite(value) and 0 < value <= _MAX_SCALE):
            raise ModelError(
                f"the factor or soft cap of {name} must be positive and at most {_MAX_SCALE:g}, got {value}"
            )
    return replace(scales, attention=None) if scales.attention == head_dim**-0.5 else scales


def read_size(config: Any, key: str) -> int:
    """Read a size; `read_config` has checked it if config.json has it, and else it is transformers' default."""
    value = getattr(config, key)
    if not isinstance(value, int):
        raise ModelError(f"{key} must be an integer, got {shown(value)}")
    return value


def read_windows(family: Family, config: Any) -> tuple[int | None, ...]:
    """Read the sliding window of each layer; None: the layer has none."""
    window = getattr(config, "sliding_window", None)
    full, sliding = "full_attention", "sliding_attention"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(isinstance(layer_type, str) for layer_type in layer_types)
    ):
        raise ModelError(f"layer_types must be a list of names, got {shown(layer_types)}")
    if layer_types is not None and len(layer_types) != config.num_hidden_layers:
        raise ModelError(f"layer_types has {len(layer_types)} entries, num_hidden_layers is {config.num_hidden_layers}")
    if family.windows != "by_layer":
        # transformers runs all layers alike here, whatever layer_types says
        same = sliding if window is not None and family.windows == "uniform" else full
        if layer_types is not None and set(layer_types) != {same}:
            raise ModelError(f"layer_types of {family.architecture} is not supported; all layers are of type {same}")
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

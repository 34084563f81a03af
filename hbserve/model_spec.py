"""A model in the numbers that the forward pass needs, read from its ``config.json``.

`hbserve.model_families` declares what ``config.json`` does not state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from hbserve.errors import ModelError
from hbserve.model_families import BY_ARCHITECTURE, FAMILIES
from hbserve.model_families.declaration import ACTIVATIONS_BY_NAME, Activation, Experts, Family, LayerNorms, Scales
from hbserve.model_files import SIZES, checkpoint_tensors, have_equal_bytes, read_config, shown
from hbserve.rope_spec import RopeSpec, check_rope_numbers, read_ropes
from hbserve.spec_parts import find_family, has_bias, read_experts, read_scales, read_size, read_windows
from hbserve.weight_format import (
    KV_SCALE_NAMES,
    Fp8Format,
    Fp8KV,
    check_kv_scheme,
    has_mxfp4_experts,
    on_load,
    read_weight_format,
)

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names in a checkpoint of the two tensors that may be tied."""


def supported_architectures() -> dict[str, str]:
    """Return transformers' class names of the supported architectures, by ``model_type``."""
    return {model_type: family.architecture for model_type, family in FAMILIES.items()}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Serving dtypes by their name in the configuration."""

_SAFETENSORS_DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Serving dtype for weights of a dtype, if config.json names none."""

_CONFIG_KEYS = (
    *SIZES,
    "tie_word_embeddings",
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)
"""Keys of config.json that the forward pass depends on, besides those of the `Family`. The others stay unread:
transformers would allocate a name for each of ``num_labels``, for example."""

_CAPTURED_FEATURES = {
    "norms of kind gemma_rms",
    "norms of a block's output",
    "norms of whole projections",
    "the activation gelu_tanh",
    "the activation relu",
}
"""Those of `ModelSpec.unfused_features` whose plain torch operations have run in CUDA graphs."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer with grouped-query attention.

    Attributes:
        architecture: transformers' class name, a key of `hbserve.model_families.BY_ARCHITECTURE`.
        norm_eps: epsilon of all norms.
        max_position_embeddings: maximum context length, stretched by YaRN where the model uses it.
        ropes: per layer, its rotary embedding; None: positions do not matter to it.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
        has_qk_norm: whether queries and keys have the norms that the family declares, if any.
        activation: function of the feed-forward layer, and of experts.
        tied_embeddings: the LM head is the embedding matrix.
        sliding_windows: per layer, the number of latest tokens that a token sees, itself included; None: all.
        dtype: dtype of the checkpoint.
        experts: the mixture of experts of some or all layers; None: all layers are dense.
        weight_format: format of the matrices in the arena; None: all are in the serving dtype.
        has_mxfp4_experts: the checkpoint has the experts in MXFP4; the arena has them in the serving dtype.
        kv_format: format of KV; None: it is in the serving dtype.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    ropes: tuple[RopeSpec | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    dtype: torch.dtype
    scales: Scales = field(default_factory=Scales)
    experts: Experts | None = None
    has_qk_norm: bool = True
    activation: Activation = "silu"
    weight_format: Fp8Format | None = None
    has_mxfp4_experts: bool = False
    kv_format: Fp8KV | None = None

    @property
    def family(self) -> Family:
        """The declaration of what all models of the architecture have in common."""
        return BY_ARCHITECTURE[self.architecture]

    @property
    def weights_name(self) -> str:
        """Name of the format of the matrices when they compute, such as ``fp8-channel``; empty: the serving dtype."""
        own = self.weight_format
        return f"fp8-{own.name}" if own is not None and own.computes else ""

    @property
    def unfused_features(self) -> list[str]:
        """Names of what the fused kernels of a layer do not compute; empty: they compute the whole layer."""
        family = self.family
        features = {
            f"norms of kind {family.norm}": family.norm not in ("rms", "olmo_rms"),  # they differ by a rounding
            "norms of a block's output": family.norms != LayerNorms(),
            "norms of whole projections": family.qk_norm == "projection",
            "norms after the rotary embedding": family.has_qk_norm_after_rope,
            "a feed-forward layer beside attention": family.is_parallel,
            "queries that grow with their positions": any(rope and rope.query_growth for rope in self.ropes),
            f"the activation {self.activation}": self.activation != "silu" and not self._activates_only_experts,
            "a feed-forward layer without gate": not family.is_gated,
            "a factor of the residual": self.scales.residual != 1,
        }
        return [name for name, is_used in features.items() if is_used]

    @property
    def uncaptured_features(self) -> list[str]:
        """Names of features whose operations were not tried in CUDA graphs."""
        return [name for name in self.unfused_features if name not in _CAPTURED_FEATURES]

    @property
    def _activates_only_experts(self) -> bool:
        """Whether gpt-oss's activation is that of experts alone, whose kernels compute it."""
        experts = self.experts
        return (
            self.activation == "clamped_swiglu"
            and experts is not None
            and all(experts.layers)
            and not experts.shared_size
        )

    @staticmethod
    def load(
        folder: str | Path,
        quantization: Literal["fp8"] | None = None,
        kv_dtype: Literal["auto", "fp8"] = "auto",
        max_model_len: int | None = None,
    ) -> ModelSpec:
        """Read ``config.json`` of a model folder.

        Args:
            quantization: ``fp8`` quantises the matrices while they are loaded, if the checkpoint's are not FP8 already.
            kv_dtype: ``fp8`` keeps KV in FP8; ``auto``: in the serving dtype.
            max_model_len: the longest context that is served; None: the model's own limit. Some rotary embeddings
                differ for long contexts.

        Raises:
            ModelError: the file cannot be read, or names something that is not supported.
        """
        folder = Path(folder)
        return ModelSpec.from_document(read_config(folder), folder, quantization, kv_dtype, max_model_len)

    @staticmethod
    def from_document(
        document: dict[str, Any],
        folder: Path,
        quantization: Literal["fp8"] | None = None,
        kv_dtype: Literal["auto", "fp8"] = "auto",
        max_model_len: int | None = None,
    ) -> ModelSpec:
        """Make a spec from the content of ``config.json``. Arguments and errors as `load`."""
        path = folder / "config.json"
        from transformers import CONFIG_MAPPING  # takes seconds, and most processes get a ready spec

        try:
            # These checks come first: transformers' message for an unknown model does not say what is supported.
            model_type, family = find_family(document)
            weight_format, is_mxfp4 = read_weight_format(document), has_mxfp4_experts(document)
            if is_mxfp4 and not family.has_expert_biases:
                raise ModelError(f"quant_method mxfp4 is not supported for {family.architecture}")
            given = {key: document[key] for key in {*_CONFIG_KEYS, *family.config_keys} if key in document}
            check_rope_numbers(given)
            if model_type not in CONFIG_MAPPING:
                raise ModelError(f"the installed transformers does not know model_type {model_type!r}; use a later one")
            try:
                config = CONFIG_MAPPING[model_type].from_dict(given)
            except Exception as error:  # transformers raises many kinds, some of them bare Exception
                raise ModelError(f"transformers cannot read it: {_first_lines(error)}") from error
            dtype, is_tied = _dtype(document, folder), _has_tied_head(config, folder)
            spec = _from_config(family, config, dtype, is_tied, max_model_len)
            if weight_format is None and quantization == "fp8":
                # Errors of the last feed-forward layer reach the logits at full size (docs/quantization.md). Those of
                # experts are smaller: a token's output is a sum of several, whose errors are independent.
                weight_format = on_load(*([] if spec.experts else [f"model.layers.{spec.num_layers - 1}.{family.mlp}"]))
            elif weight_format is not None and _has_quantised_head(folder):
                weight_format = replace(weight_format, has_head=True)
            if kv_dtype == "fp8":
                check_kv_scheme(document)
            return replace(
                spec,
                weight_format=weight_format,
                has_mxfp4_experts=is_mxfp4,
                kv_format=_kv_format(folder) if kv_dtype == "fp8" else None,
            )
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


def _first_lines(error: Exception) -> str:
    """Shorten an error of transformers to one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _from_config(
    family: Family, config: Any, dtype: torch.dtype, tied_embeddings: bool, max_model_len: int | None
) -> ModelSpec:
    name = getattr(config, family.activation_key)
    known = {key: value for key, value in ACTIVATIONS_BY_NAME.items() if (value == "xielu") == bool(family.curve)}
    activation = family.activation or (known.get(name) if isinstance(name, str) else None)
    if activation is None:
        raise ModelError(f"{family.activation_key} {shown(name)} is not supported; supported are {', '.join(known)}")
    for key, values in family.fixed.items():
        value = getattr(config, key, None)
        if value not in values:
            raise ModelError(f"{key} {shown(value)} is not supported; supported is {json.dumps(values[0])}")
    # a class whose layers all have experts may have no intermediate_size
    sizes = {key: read_size(config, key) for key in SIZES if key != "head_dim" and hasattr(config, key)}
    num_heads, num_kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if getattr(config, "head_dim", None) is None:
        head_dim = sizes["hidden_size"] // num_heads
    else:
        head_dim = read_size(config, "head_dim")
    if head_dim < 2 or head_dim % 2:
        raise ModelError(
            f"head_dim {head_dim} is odd or 0; the rotary embedding needs an even one. Without head_dim it is "
            "hidden_size / num_attention_heads"
        )
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    norm_eps = getattr(config, family.norm_eps_key)
    if not 0 <= norm_eps <= 1:
        raise ModelError(f"{family.norm_eps_key} must be in [0, 1], got {norm_eps}")
    sliding_windows = read_windows(family, config)
    ropes = read_ropes(family, config, head_dim, max_model_len)
    max_positions = sizes["max_position_embeddings"]
    for rope in {rope for rope in ropes if rope is not None}:
        if rope.kind == "yarn":  # only some checkpoints state the stretched context here
            stretched = int(rope.factor * rope.original_max_position_embeddings)
            max_positions = min(max(max_positions, stretched), SIZES["max_position_embeddings"])
    return ModelSpec(
        architecture=family.architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=read_size(config, family.width_key) if hasattr(config, family.width_key) else 0,
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=float(norm_eps),
        max_position_embeddings=max_positions,
        ropes=ropes,
        qkv_bias=has_bias(family.qkv_bias, config),
        o_bias=has_bias(family.o_bias, config),
        mlp_bias=has_bias(family.mlp_bias, config),
        tied_embeddings=tied_embeddings,
        sliding_windows=sliding_windows,
        dtype=dtype,
        scales=read_scales(family, config, head_dim),
        experts=read_experts(family, config),
        has_qk_norm=family.qk_norm_key is None or bool(getattr(config, family.qk_norm_key)),
        activation=activation,
    )


def _has_tied_head(config: Any, folder: Path) -> bool:
    """Whether the LM head is the embedding matrix.

    As in transformers 5, a head in the files that differs from the embeddings is the model's own, whatever
    ``tie_word_embeddings`` says. Files that cannot be read are left to the loader.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return False
    try:
        tensors = checkpoint_tensors(folder)
        if EMBEDDING not in tensors or LM_HEAD not in tensors:
            return True
        return have_equal_bytes(tensors[EMBEDDING], tensors[LM_HEAD])
    except (ModelError, OSError):
        return True


def _has_quantised_head(folder: Path) -> bool:
    """Whether the LM head has scales; files that cannot be read are left to the loader."""
    try:
        tensors = checkpoint_tensors(folder)
    except (ModelError, OSError):
        return False
    return any(f"{LM_HEAD}{suffix}" in tensors for suffix in ("_scale", "_scale_inv"))


def _kv_format(folder: Path) -> Fp8KV:
    """Find the scales of KV in the checkpoint; files that cannot be read are left to the loader."""
    try:
        tensors = checkpoint_tensors(folder)
    except (ModelError, OSError):
        return Fp8KV()
    found = (names for names in KV_SCALE_NAMES if f"model.layers.0.{names[0]}" in tensors)
    return Fp8KV(next(found, None))


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

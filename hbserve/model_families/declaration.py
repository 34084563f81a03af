"""What a family of models declares: how its layers differ from Llama's. The defaults are Llama's layer.

A declaration holds what the class in transformers fixes, and which keys of ``config.json`` set the rest. A key that the
class does not read has no effect, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NormKind = Literal["rms", "olmo_rms", "gemma_rms", "layer", "layer_1p", "plain_layer"]
"""Kinds of norms; `hbserve.layers.norms` has the formulae."""

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu2", "clamped_swiglu", "xielu"]

ACTIVATIONS_BY_NAME: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
"""Activations by their names in ``config.json``."""


@dataclass(frozen=True)
class LayerNorms:
    """Names of a layer's norms in the checkpoint; None: there is no norm at that place.

    Attributes:
        attention_in, mlp_in: norms of what attention and the feed-forward layer read.
        attention_out, mlp_out: norms of what they add to the residual stream.
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


@dataclass(frozen=True)
class Scales:
    """Factors and soft caps of a model. A soft cap c turns x into ``c * tanh(x / c)``.

    Attributes:
        embedding: factor of the embeddings.
        residual: factor of what a block adds to the residual stream.
        attention: factor of attention scores; None: ``1 / sqrt(head_dim)``.
        attention_cap: soft cap of the scaled scores.
        logits: factor of the logits.
        logits_cap: soft cap of the logits, after their factor.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float | None = None
    attention_cap: float | None = None
    logits: float = 1.0
    logits_cap: float | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward layer (Shazeer et al. 2017, Fedus et al. 2021).

    A router scores the experts. Each token is computed by the best ones; their outputs are weighted by the scores.

    Attributes:
        num_experts, num_chosen: experts of a layer, and of a token.
        inner_size: width of an expert.
        is_renormalised: the weights of a token are divided by their sum.
        layers: per layer, whether it has experts.
        scoring: function of the router's outputs that makes scores.
        has_bias: a bias counts in the choice, not in the weights (DeepSeek-AI 2024, section 2.1.2), and the router
            computes in float32, because small differences choose the experts.
        num_groups, num_chosen_groups: equal groups of experts, and how many of them the experts of a token are chosen
            from: those with the greatest sums of their two best scores (ibid.).
        scale: factor of the weights.
        shared_size: width of the expert that computes every token; 0: there is none.
        has_shared_gate: the output of that expert has a weight, the sigmoid of a product with the input.
    """

    num_experts: int
    num_chosen: int
    inner_size: int
    is_renormalised: bool
    layers: tuple[bool, ...]
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0
    shared_size: int = 0
    has_shared_gate: bool = False


def _no_scales(config: Any) -> Scales:
    return Scales()


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        model_type, architecture: its two names in ``config.json``.
        saved_as: architecture that transformers writes instead, because its class has no code of its own.
        norm: kind of all its norms.
        norms: where a layer has norms.
        is_parallel: the feed-forward layer reads what attention reads, not the sum with its output (Wang and
            Komatsuzaki 2021, GPT-J).
        qk_norm: norms of queries and keys before the rotary embedding: of each ``head``, of each head with its ``own``
            weights, or RMS norms of the whole ``projection``; None: there are none. ``qk_norm_key`` is a key of
            ``config.json`` without which there are none; None: no key matters. ``qk_norm_names`` are their names in the
            checkpoint.
        has_qk_norm_after_rope: these norms come after the rotary embedding instead.
        qkv, up: names of matrices that read one input, in the order of their rows. One name for several matrices is a
            tensor that holds all of them.
        mlp: name of the feed-forward layer.
        o, down: names of the matrices that end attention and the feed-forward layer.
        width_key: key of the feed-forward layer's width.
        is_gated: the feed-forward layer computes ``activation(gate) * up``; else ``activation(up)``.
        activation_key: key that names the activation of the feed-forward layer.
        activation: that activation, whatever the key says; None: the key counts.
        curve: names of four numbers of the activation within the feed-forward layer; empty: it has no parameters.
        qkv_bias, o_bias, mlp_bias: these projections have a bias: always, never, or as a key of ``config.json`` says.
        norm_eps_key: key of the norms' epsilon.
        is_partly_rotated: ``partial_rotary_factor`` is the rotated part of each head.
        is_interleaved: pairs of the rotary embedding are neighbours, not half a head apart.
        has_rope_alpha: ``alpha`` of a ``dynamic`` rotary embedding stretches all contexts.
        has_query_growth: ``llama_4_scaling_beta`` of a ``yarn`` rotary embedding makes late queries longer.
        has_rope_by_type: ``rope_parameters`` has one entry for each type of layer.
        rotated_layers: reads from transformers' configuration, for each layer, whether it has a rotary embedding; None:
            all have one.
        has_draft_layers: checkpoints may have more layers than the model; they draft tokens, and stay unread.
        has_sinks: each head has a sink: a score without a value, which counts in the softmax of all queries (Xiao et
            al. 2023, section 3.3).
        windows: which layers have a sliding window: ``none``, those that ``layer_types`` names (``by_layer``), or all
            if ``sliding_window`` is set (``uniform``).
        experts: reads the mixture of experts from transformers' configuration; None: there is none. In the checkpoint
            the router is ``router``, and each expert has the names of a feed-forward layer under ``experts.<i>``.
        router, router_bias: names of the router and of its bias in the checkpoint.
        stacked_experts: names of two tensors with the matrices of all experts, ``gate | up`` and down; None: each
            expert has its own.
        has_expert_biases: the router and the experts have biases. The tensors of ``stacked_experts`` then are
            ``[experts, inputs, outputs]``, those of biases have the suffix ``_bias``, and outputs of gate and up take
            turns.
        shared_expert: name of the expert that computes every token, within the layer.
        shared_matrices: names of its matrices, as ``up`` and ``down``; None: they have those names.
        scales: reads factors and soft caps from transformers' configuration.
        keys: other keys of ``config.json`` that the fields above depend on.
        fixed: keys with the values that the forward pass computes; other values are refused.
    """

    model_type: str
    architecture: str
    saved_as: str | None = None
    norm: NormKind = "rms"
    norms: LayerNorms = LayerNorms()
    is_parallel: bool = False
    qk_norm: Literal["head", "own", "projection"] | None = None
    qk_norm_key: str | None = None
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    has_qk_norm_after_rope: bool = False
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    width_key: str = "intermediate_size"
    is_gated: bool = True
    activation_key: str = "hidden_act"
    activation: Activation | None = None
    curve: tuple[str, ...] = ()
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    norm_eps_key: str = "rms_norm_eps"
    is_partly_rotated: bool = False
    is_interleaved: bool = False
    has_rope_alpha: bool = False
    has_query_growth: bool = False
    has_rope_by_type: bool = False
    rotated_layers: Callable[[Any], Any] | None = None
    has_draft_layers: bool = False
    has_sinks: bool = False
    windows: Literal["none", "by_layer", "uniform"] = "none"
    experts: Callable[[Any], Experts] | None = None
    router: str = "gate"
    router_bias: str = "gate.e_score_correction_bias"
    stacked_experts: tuple[str, str] | None = None
    has_expert_biases: bool = False
    shared_expert: str = "mlp.shared_experts"
    shared_matrices: tuple[tuple[str, ...], str] | None = None
    scales: Callable[[Any], Scales] = _no_scales
    keys: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def has_norm_bias(self) -> bool:
        """Whether its norms have a bias besides the weight."""
        return self.norm in ("layer", "layer_1p")

    @property
    def config_keys(self) -> set[str]:
        """Keys of ``config.json`` that this declaration names."""
        named = (self.qkv_bias, self.o_bias, self.mlp_bias, self.qk_norm_key)
        keys = {key for key in named if isinstance(key, str)}
        return keys | {self.activation_key, self.norm_eps_key, self.width_key, *self.keys, *self.fixed}

"""The forward pass of all supported models, on the thread that launches steps.

One layer, and the method that computes each part::

    stream ─► norm ─► qkv ─► head norms, rotation ─► q        before_attention
                                          k, v ─► KV cache
    q ─► attention over the KV cache ─► attended              Attention.attend
    attended ─► o ─► + stream                                 after_attention
    stream ─► norm ─► gate, up ─► silu(gate) * up ─► down ─► + stream

Families differ in the norms, in the activation and in factors (`hbserve.model_families`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from hbserve.attention.base import Attention
from hbserve.layers.linear import Linear, PlainLinear
from hbserve.layers.mixture.plain import ExpertWeights
from hbserve.layers.ops import HeadNorms, LayerOps, ResidualStream
from hbserve.layers.parallel import TensorParallel, join_vocab_shards, vocab_parallel_embedding
from hbserve.model_spec import ModelSpec
from hbserve.models.schemes import make_linear
from hbserve.platform.cuda_driver import has_triton
from hbserve.weight_format import Fp8Format

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layer:
    """Parameters of one layer; `hbserve.models.weights.WeightTable` says what they are.

    Attributes:
        mlp: ``up`` and ``down`` of a dense layer, or experts.
    """

    qkv: Linear
    o: Linear
    mlp: tuple[Linear, Linear] | ExpertWeights
    attention_in_norm: Tensor | None = None
    attention_out_norm: Tensor | None = None
    mlp_in_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    curve: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What differs by the kernels of two layers: the schemes of their linear layers, or that they have experts."""
        linears = (self.qkv, self.o, *(self.mlp if isinstance(self.mlp, tuple) else ()))
        experts = None if isinstance(self.mlp, tuple) else self.mlp.up.dtype
        return *(type(linear) for linear in linears), experts

    @staticmethod
    def build(tensors: dict[str, Tensor], dtype: torch.dtype, weight_format: Fp8Format | None) -> _Layer:
        """Take the layer's tensors, by their names in the `WeightTable`; an unknown name is a TypeError."""

        def linear(name: str) -> Linear:
            return make_linear(tensors, name, dtype, weight_format)

        qkv, o = linear("qkv"), linear("o")
        mlp: tuple[Linear, Linear] | ExpertWeights
        if "router" in tensors:
            given: dict[str, Any] = {name: linear(name) for name in ("shared_up", "shared_down") if name in tensors}
            given |= {field.name: tensors.pop(field.name) for field in fields(ExpertWeights) if field.name in tensors}
            mlp = ExpertWeights(**given)
        else:
            mlp = linear("up"), linear("down")
        return _Layer(qkv=qkv, o=o, mlp=mlp, **tensors)


class LayerTaps(Protocol):
    """Takes inputs of layers out of a forward pass, for a head that guesses tokens. Attributes: layers: which ones."""

    layers: tuple[int, ...]

    def take(self, layer: int, hidden: Tensor, slots: Tensor) -> None:
        """Take the input ``[tokens, hidden]`` of any layer; it changes later.

        Args:
            slots: int64 ``[tokens]``, KV slots of the tokens, -1 of padding.
        """
        ...


class Decoder:
    """A decoder-only transformer over flat batches: the tokens of all sequences one after the other.

    Args:
        weights: `WeightTable.views` of this rank; the decoder uses them in place.
        parallel: the group of ranks that computes the model; None: this process alone.

    Attributes:
        taps: takes the inputs of some layers; None: nothing reads them.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], parallel: TensorParallel | None = None) -> None:
        self.spec = spec
        self.parallel = parallel or TensorParallel()
        self.embedding, self.final_norm, self.lm_head = (
            weights[name] for name in ("embedding", "final_norm", "lm_head")
        )
        self.taps: LayerTaps | None = None
        # transformers rounds the factor of the embeddings to the model's dtype
        self._embedding_scale = self.embedding.new_tensor(spec.scales.embedding, device="cpu").item()
        self._ops = _select_ops(spec, self.embedding.device, self.parallel)
        self.layers = []
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}."
            tensors = {name.removeprefix(prefix): view for name, view in weights.items() if name.startswith(prefix)}
            self.layers.append(_Layer.build(tensors, self.embedding.dtype, spec.weight_format))

    @property
    def typical_layers(self) -> list[int]:
        """Layers that together load every kernel: the first two, and one for each kind of layer.

        Kinds differ in the size of a sliding window, in whether there are experts, and in the schemes of weights.
        """
        kinds: list[Sequence[object]] = [self.spec.sliding_windows, [layer.kind for layer in self.layers]]
        firsts = {values.index(value) for values in kinds for value in set(values)}
        firsts |= set() if self.taps is None else {*self.taps.layers}
        return sorted({0, min(1, len(self.layers) - 1), *firsts})

    @property
    def can_skip_kernels(self) -> bool:
        """Whether a step may leave kernels out, so that its results are undefined.

        Outputs of the kernels of experts are indices, and ranks wait for each other's kernels.
        """
        return self.spec.experts is None and self.parallel.size == 1

    @property
    def can_be_captured(self) -> bool:
        """Whether no operation waits for the host, on a GPU with Triton: experts without kernels do."""
        return self._ops.has_expert_kernels or self.spec.experts is None

    @property
    def expert_totals(self) -> Tensor | None:
        """Tokens that each expert has computed: int64 ``[layers, experts]``; None: there are no experts."""
        return self._ops.expert_totals

    def token_parameters(self, index: int) -> int:
        """Return how many parameters of this rank's share of a layer take part in the computation of one token."""
        layer = self.layers[index]
        count = layer.qkv.num_weights + layer.o.num_weights
        if not isinstance(layer.mlp, ExpertWeights):
            return count + sum(linear.num_weights for linear in layer.mlp)
        assert self.spec.experts is not None, "the model has experts"
        all_experts = layer.mlp.up.numel() + layer.mlp.down.numel()
        layers = (layer.mlp.shared_up, layer.mlp.shared_down)
        shared = (0 if linear is None else linear.num_weights for linear in layers)
        return count + all_experts * self.spec.experts.num_chosen // self.spec.experts.num_experts + sum(shared)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        on_stored: Callable[[int], None] = lambda layer: None,
        layers: Iterable[int] | None = None,
    ) -> Tensor:
        """Compute hidden states ``[tokens, hidden]`` after the final norm, and write the tokens' KV to the cache.

        Args:
            token_ids, positions: integers ``[tokens]``, in the order of the batch that ``attention`` has begun.
            on_stored: called with a layer's index when its keys and values are in the cache; on a GPU, when the
                kernel that writes them has been launched.
            layers: compute these layers only, to load their kernels; the result then has no meaning.
        """
        stream = self.embed(token_ids)
        for _ in self.pass_layers(stream, positions, attention, on_stored, layers):
            pass
        return self.finish(stream)

    def pass_layers(
        self,
        stream: ResidualStream,
        positions: Tensor,
        attention: Attention,
        on_stored: Callable[[int], None] = lambda layer: None,
        layers: Iterable[int] | None = None,
    ) -> Iterator[None]:
        """Pass the residual stream through the layers, and yield after each; arguments as those of `forward`."""
        q, attended = (self.heads_buffer(len(positions)) for _ in range(2))
        for index in range(len(self.layers)) if layers is None else layers:
            qkv, norms = self._project(index, stream, attention)
            self._ops.attend(qkv, norms, positions, attention, index, q, attended, on_stored)
            self.after_attention(index, stream, attended, attention)
            yield

    def embed_next(self, given: Tensor, last: Tensor, slots: Tensor) -> ResidualStream:
        """Start the residual stream with the embeddings of ``given`` tokens, or of what their slots have sampled last.

        Arguments as those of `LayerOps.embed`.
        """
        scale = self._embedding_scale
        return ResidualStream(self._ops.embed(given, last, slots, self.embedding, self.spec.vocab_size, scale))

    def embed(self, token_ids: Tensor) -> ResidualStream:
        """Start the residual stream with the tokens' embeddings."""
        rows = vocab_parallel_embedding(token_ids, self.embedding, self.spec.vocab_size, self.parallel)
        return ResidualStream(rows if self._embedding_scale == 1 else rows * self._embedding_scale)

    def heads_buffer(self, num_tokens: int) -> Tensor:
        """Allocate memory for query heads or for their attention outputs: ``[tokens, heads, head_dim]``."""
        return self.embedding.new_empty(num_tokens, self.spec.num_heads // self.parallel.size, self.spec.head_dim)

    def before_attention(
        self, index: int, stream: ResidualStream, positions: Tensor, attention: Attention, q: Tensor
    ) -> None:
        """Compute a layer up to its attention: write queries to ``q``, keys and values to the cache."""
        qkv, norms = self._project(index, stream, attention)
        self._ops.rotate_and_store(qkv, norms, positions, attention, index, q)

    def _project(self, index: int, stream: ResidualStream, attention: Attention) -> tuple[Tensor, HeadNorms]:
        """Compute q, k and v of a layer ``[tokens, (heads + 2 kv heads) * head_dim]``; also return its head norms."""
        layer, ops = self.layers[index], self._ops
        if self.spec.family.is_parallel:
            stream.block_input = ops.norm(stream, layer.attention_in_norm)
            qkv = ops.linear(stream.block_input, layer.qkv)
        else:
            qkv = ops.norm_linear(stream, layer.attention_in_norm, layer.qkv)
        if self.taps is not None:  # the norm has added what was pending to the stream
            self.taps.take(index, stream.total, attention.slot_mapping)
        return qkv, None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)

    def after_attention(self, index: int, stream: ResidualStream, attended: Tensor, attention: Attention) -> None:
        """Compute the rest of a layer: output projection and feed-forward layer, both added to the stream."""
        layer, ops = self.layers[index], self._ops
        ops.add_linear(stream, attended.flatten(1), layer.o, layer.attention_out_norm)
        if isinstance(layer.mlp, ExpertWeights):
            ops.add_experts(
                stream, layer.mlp_in_norm, layer.mlp, index, attention.slot_mapping, norm=layer.mlp_out_norm
            )
            return
        up, down = layer.mlp
        source = stream
        if stream.block_input is not None:
            ops.norm(stream, None)  # adds the output of attention
            source = ResidualStream(stream.block_input)
        inner = ops.norm_up_linear(source, layer.mlp_in_norm, up, reader=down, curve=layer.curve)
        ops.add_linear(stream, inner, down, layer.mlp_out_norm)

    def finish(self, stream: ResidualStream) -> Tensor:
        """Return the final norm of the stream, ``[tokens, hidden]``."""
        return self._ops.norm(stream, self.final_norm)

    @property
    def num_logits(self) -> int:
        """Columns of `shard_logits`."""
        return self.lm_head.shape[0]

    @property
    def logits_parallel(self) -> TensorParallel:
        """The ranks that share the logits out."""
        return self.parallel

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits ``[rows, vocab]`` of rows of `forward`'s result, in the model's dtype."""
        return self.all_logits(self.shard_logits(hidden))

    def shard_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits ``[rows, part]`` of this rank's `vocab_shard`, in ``out`` if given."""
        return self._scaled_(self._ops.linear(hidden, PlainLinear(self.lm_head), out))

    def stream_logits(self, stream: ResidualStream, out: Tensor | None = None) -> Tensor:
        """Compute `shard_logits` of what `finish` returns."""
        if stream.total.shape[0] > 1:
            return self.shard_logits(self.finish(stream), out)
        return self._scaled_(self._ops.norm_linear(stream, self.final_norm, PlainLinear(self.lm_head), out))

    def _scaled_(self, logits: Tensor) -> Tensor:
        """Apply the factor and the cap of logits, in place."""
        scales = self.spec.scales
        if scales.logits != 1:
            logits.mul_(scales.logits)
        if scales.logits_cap is not None:
            logits.div_(scales.logits_cap).tanh_().mul_(scales.logits_cap)
        return logits

    def all_logits(self, shard: Tensor) -> Tensor:
        """Gather logits ``[rows, vocab]`` from all ranks' `shard_logits`."""
        return join_vocab_shards(self.parallel.gather(shard), self.spec.vocab_size, self.parallel.size)


def _select_ops(spec: ModelSpec, device: torch.device, parallel: TensorParallel) -> LayerOps:
    """Choose `FusedOps` if Triton can compile for ``device`` and the kernels know the model, else `LayerOps`."""
    if not has_triton(device):
        return LayerOps(spec, device, parallel)
    if spec.unfused_features:
        logger.info(
            "%s runs on plain torch operations, which are slower: there are no fused kernels for %s",
            spec.architecture,
            ", ".join(spec.unfused_features),
        )
        return LayerOps(spec, device, parallel)
    from hbserve.layers.fused_ops import FusedOps

    return FusedOps(spec, device, parallel)

"""The one forward pass of all supported models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from hbserve.attention.base import Attention
from hbserve.layers.ops import ResidualStream, select_ops
from hbserve.layers.parallel import TensorParallel, join_vocab_shards, vocab_parallel_embedding
from hbserve.layers.rotary import RotaryEmbedding
from hbserve.model_spec import ModelSpec


@dataclass(frozen=True)
class _Layer:
    """Parameters of one layer; see `hbserve.models.weights.WeightTable` for what they are."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Decoder:
    """A decoder-only transformer over flat batches: the tokens of all sequences one after the other.

    Args:
        weights: `WeightTable.views` of this rank; they are used in place.
        parallel: the group that computes the model together.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], parallel: TensorParallel | None = None
    ) -> None:
        self.spec = spec
        self.parallel = parallel or TensorParallel()
        self.embedding, self.final_norm, self.lm_head = (
            weights[name] for name in ("embedding", "final_norm", "lm_head")
        )
        self.rotary = RotaryEmbedding(spec.rope, spec.head_dim, self.embedding.device)
        self._ops = select_ops(self.embedding)
        self.layers = []
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            self.layers.append(_Layer(**own))

    @property
    def typical_layers(self) -> list[int]:
        """The first two layers and one of each kind of attention: they do all that any layer does."""
        windows = self.spec.sliding_windows
        return sorted({0, min(1, len(self.layers) - 1), *(windows.index(window) for window in set(windows))})

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        on_stored: Callable[[int], None] = lambda layer: None,
        layers: Iterable[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[tokens, hidden]`` after the final norm; the tokens' KV is in the cache then.

        Args:
            token_ids, positions: integers ``[tokens]``, in the order of the batch that ``attention``
                was told about.
            on_stored: called when a layer's keys and values are in the cache; on a GPU, when they have been asked for.
            layers: only these, so that what is loaded at its first use is loaded; what comes out means nothing.
        """
        stream = self.embed(token_ids)
        q, out = (self.heads_buffer(len(token_ids)) for _ in range(2))
        for index in range(len(self.layers)) if layers is None else layers:
            self.before_attention(index, stream, positions, attention, q)
            on_stored(index)
            attention.attend(index, q, out)
            self.after_attention(index, stream, out)
        return self.finish(stream)

    def embed(self, token_ids: torch.Tensor) -> ResidualStream:
        """Where the layers begin."""
        rows = vocab_parallel_embedding(token_ids, self.embedding, self.spec.vocab_size, self.parallel)
        return ResidualStream(rows)

    def heads_buffer(self, num_tokens: int) -> torch.Tensor:
        """Memory for the query heads of tokens, or for what they attend to: ``[tokens, heads, head_dim]``."""
        return self.embedding.new_empty(num_tokens, self.spec.num_heads // self.parallel.size, self.spec.head_dim)

    def before_attention(
        self, index: int, stream: ResidualStream, positions: torch.Tensor, attention: Attention, q: torch.Tensor
    ) -> None:
        """A layer up to its attention: queries go to ``q``, keys and values to the cache."""
        layer, ops, eps = self.layers[index], self._ops, self.spec.rms_norm_eps
        qkv = ops.norm_linear(stream, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
        ops.rotate_and_store(qkv, layer.q_norm, layer.k_norm, eps, positions, self.rotary, attention, index, q)

    def after_attention(self, index: int, stream: ResidualStream, attended: torch.Tensor) -> None:
        """The rest of the layer."""
        layer, ops, eps = self.layers[index], self._ops, self.spec.rms_norm_eps
        ops.add_linear(stream, attended.flatten(1), layer.o, layer.o_bias, self.parallel)
        inner = ops.norm_gated_linear(stream, layer.mlp_norm, eps, layer.gate_up, layer.gate_up_bias)
        ops.add_linear(stream, inner, layer.down, layer.down_bias, self.parallel)

    def finish(self, stream: ResidualStream) -> torch.Tensor:
        """What the layers have made of the tokens, ``[tokens, hidden]``."""
        return self._ops.norm(stream, self.final_norm, self.spec.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab]``, in the model's dtype, of rows of `forward`'s result."""
        return self.all_logits(self.shard_logits(hidden))

    def shard_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[rows, part]`` of this rank's `vocab_shard`, in ``out`` if given."""
        if out is None:
            return self._ops.linear(hidden, self.lm_head, None)
        return self._ops.linear_into(hidden, self.lm_head, out)

    def all_logits(self, shard: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab]`` of all ranks' `shard_logits`."""
        return join_vocab_shards(self.parallel.gather(shard), self.spec.vocab_size, self.parallel.size)

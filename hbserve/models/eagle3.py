"""The forward pass of an EAGLE-3 head, and what the target stores for it.

The target computes token after token; of each one three hidden states on its way become a *feature*::

    target    inputs of three layers ─► joined ─► fc ─► feature of position p         `HiddenTaps`, `FeatureStore`
    head      embedding of token p + 1, feature of p ─► one layer ─► guess of token p + 2        `Eagle3Head`

For the guess after that the head's own output, before its last norm, stands for the feature of p + 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.attention.base import Attention
from hbserve.layers.linear import PlainLinear
from hbserve.layers.ops import LayerOps, ResidualStream
from hbserve.layers.parallel import TensorParallel, join_vocab_shards, vocab_parallel_embedding
from hbserve.models.decoder import Decoder
from hbserve.models.eagle3_spec import Eagle3Spec, target_token_ids


class FeatureStore:
    """The features of a pool's tokens, which lie with their KV in the pool's blocks.

    Args:
        features: ``[block, token, size]``; the last block is for padding, whose KV slot is -1.
    """

    def __init__(self, features: Tensor) -> None:
        self._features, self._block_size = features, features.shape[1]

    def write(self, slots: Tensor, features: Tensor) -> None:
        """Store features ``[tokens, size]`` of the tokens of these KV slots."""
        self._features[self._places(slots)] = features

    def read(self, slots: Tensor) -> Tensor:
        """Return the features ``[tokens, size]`` of the tokens of these KV slots."""
        return self._features[self._places(slots)]

    def carried(self, num_slots: int) -> Tensor:
        """Return zeros for a feature of each of so many slots of sequences."""
        return self._features.new_zeros(num_slots, self._features.shape[2])

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return slots // self._block_size, slots % self._block_size  # of padding: the last token of the last block


class HiddenTaps:
    """Takes the hidden states that a head reads out of the target's forward pass, and stores their features.

    Args:
        weights: of the head.
        ops: of the head's layer.
    """

    def __init__(self, spec: Eagle3Spec, weights: Mapping[str, Tensor], store: FeatureStore, ops: LayerOps) -> None:
        self.layers, self._ops = spec.tapped_layers, ops
        self._fc, self._norm, self._eps = PlainLinear(weights["fc"]), weights.get("fc_norm"), spec.layer.norm_eps
        self._store, self._first, self._last = store, min(spec.tapped_layers), max(spec.tapped_layers)
        self._joined: Tensor | None = None

    def take(self, layer: int, hidden: Tensor, slots: Tensor) -> None:
        """Take a layer's input; with the last one that is needed, store the features.

        Args:
            hidden: ``[tokens, hidden]``; it changes later.
            slots: int64 ``[tokens]``, KV slots of the tokens, -1 of padding.
        """
        places = [place for place, tapped in enumerate(self.layers) if tapped == layer]
        if not places:
            return
        rows, size = hidden.shape
        if layer == self._first:
            self._joined = hidden.new_empty(rows, size * len(self.layers))
        if self._joined is None or self._joined.shape[0] != rows:
            return  # a pass that loads kernels computes only some layers
        for place in places:
            self._joined[:, place * size : (place + 1) * size] = hidden
        if layer == self._last:
            joined, self._joined = self._joined, None
            if self._norm is not None:
                joined = F.rms_norm(joined, (joined.shape[1],), self._norm, self._eps)
            self._store.write(slots, self._ops.linear(joined, self._fc))


class Eagle3Head(Decoder):
    """A head as a decoder of one layer that has two inputs.

    Args:
        weights: `Eagle3Spec.table`'s views of this rank.
        embedding: of the target, which a head without its own shares.
    """

    def __init__(
        self, spec: Eagle3Spec, weights: Mapping[str, Tensor], embedding: Tensor, parallel: TensorParallel
    ) -> None:
        super().__init__(spec.layer, {"embedding": embedding, **weights}, parallel)
        self._draft_vocab_size, self._norm_before_residual = spec.draft_vocab_size, spec.norm_before_residual
        self._embedding_norm = weights["embedding_norm"]
        self._token_ids = target_token_ids(weights["token_map"]) if spec.has_token_map else None

    @property
    def ops(self) -> LayerOps:
        """The operations of its layer."""
        return self._ops

    @property
    def num_logits(self) -> int:
        return self.spec.vocab_size

    @property
    def logits_parallel(self) -> TensorParallel:
        return TensorParallel()

    def guess(
        self, token_ids: Tensor, positions: Tensor, features: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """Compute hidden states ``[tokens, hidden]`` for the logits, and those that follow as features.

        Args:
            token_ids, positions: integers ``[tokens]``, in the order of the batch that ``attention`` has begun.
            features: ``[tokens, hidden]``, of the positions before the tokens'; overwritten.
        """
        layer, ops = self.layers[0], self._ops
        embedded = vocab_parallel_embedding(token_ids, self.embedding, self.spec.vocab_size, self.parallel)
        normed = ops.norm(ResidualStream(embedded), self._embedding_norm)
        stream = ResidualStream(features)
        inputs = ops.norm(stream, layer.attention_in_norm)
        if self._norm_before_residual:
            stream = ResidualStream(inputs.clone())
        q, attended = (self.heads_buffer(len(token_ids)) for _ in range(2))
        qkv = ops.linear(torch.cat([normed, inputs], -1), layer.qkv)
        ops.rotate_and_store(qkv, None, positions, attention, 0, q)
        attention.attend(0, q, attended)
        self.after_attention(0, stream, attended, attention)
        return self.finish(stream), stream.total

    def shard_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits ``[rows, vocab]`` of the target's vocabulary, the same on every rank.

        Tokens that the head cannot guess have minus infinity.
        """
        shard = super().shard_logits(hidden)
        logits = join_vocab_shards(self.parallel.gather(shard), self._draft_vocab_size, self.parallel.size)
        if out is None:
            out = logits.new_empty(len(logits), self.spec.vocab_size)
        out.fill_(-torch.inf)
        if self._token_ids is None:
            out[:, : logits.shape[1]] = logits
        else:
            out.index_copy_(1, self._token_ids, logits)
        return out

    def all_logits(self, shard: Tensor) -> Tensor:
        return shard

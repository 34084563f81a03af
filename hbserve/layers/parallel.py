"""Layers that a tensor-parallel group computes together (Shoeybi et al. 2019, Megatron-LM).

Column-parallel layers (qkv, gate and up) need no code here: their weights are shards and their outputs stay sharded.
Row-parallel layers (o, down) end with a sum over the ranks; the vocabulary is shared out by `vocab_shard`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Collective = Callable[[Tensor], Tensor]
SummandPlace = Callable[[tuple[int, ...], torch.dtype], Tensor | None]
SumAndNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Function of summand, residual, weight and epsilon: adds the ranks' summands to the residual, in place, and returns
the RMS norm of the residual."""


@dataclass(frozen=True)
class TensorParallel:
    """One rank of a group.

    Attributes:
        all_reduce: sums a tensor over the ranks; required if ``size`` is above 1.
        all_gather: joins the ranks' tensors along the last dimension, in rank order; required if ``size`` is above 1.
        summand_place: returns memory for a tensor of a shape and dtype where `all_reduce` is fastest, or None if
            there is none. Two places take turns: a sum stays valid until the second next call.
        has_whole_experts: each rank has some experts whole, not a slice of each (Lepikhin et al. 2020, GShard).
        sum_and_norm: sums what lies in a `summand_place` over the ranks and computes the next norm, in one kernel.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Collective | None = None
    all_gather: Collective | None = None
    summand_place: SummandPlace | None = None
    sum_and_norm: SumAndNorm | None = None
    has_whole_experts: bool = False

    def local_experts(self, num_experts: int) -> tuple[int, int]:
        """Return the first of this rank's experts, and how many it has of each or whole."""
        count = num_experts // self.size if self.has_whole_experts else num_experts
        return self.rank * count if self.has_whole_experts else 0, count

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks."""
        if self.size == 1:
            return x
        assert self.all_reduce is not None, "a group of several ranks needs its all_reduce"
        return self.all_reduce(x)

    def summand(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return memory ``[rows, columns]`` for a summand, to `reduce`; None: use any."""
        return None if self.summand_place is None else self.summand_place((rows, columns), dtype)

    def gather(self, x: Tensor) -> Tensor:
        """Return the ``x`` of all ranks, side by side in the last dimension."""
        if self.size == 1:
            return x
        assert self.all_gather is not None, "a group of several ranks needs its all_gather"
        return self.all_gather(x)

    def minimum(self, x: Tensor) -> Tensor:
        """Return the elementwise minimum of the vector ``x`` over the ranks."""
        return self.gather(x).view(self.size, -1).amin(0)


def vocab_shard(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    """Return the rows ``start .. stop`` of the embedding and the LM head that a rank holds.

    All ranks hold equally many rows. If ``vocab_size`` is not a multiple of ``size``, this number is rounded up to a
    multiple of 8, which suits matrix products, and the last shards begin earlier so that they end with the vocabulary.
    Their first rows are then also in another shard. Example, 21 tokens on two ranks: 0 .. 16 and 5 .. 21.
    """
    num_rows = vocab_size // size if vocab_size % size == 0 else min(-(-vocab_size // (8 * size)) * 8, vocab_size)
    start = min(rank * num_rows, vocab_size - num_rows)
    return start, start + num_rows


def vocab_parallel_embedding(token_ids: Tensor, weight: Tensor, vocab_size: int, parallel: TensorParallel) -> Tensor:
    """Look up rows ``[tokens, hidden]`` of an embedding; ``weight`` is this rank's `vocab_shard` of it."""
    if parallel.size == 1:
        return F.embedding(token_ids, weight)
    start, _ = vocab_shard(vocab_size, parallel.rank, parallel.size)
    is_local = token_ids // weight.shape[0] == parallel.rank
    rows = F.embedding((token_ids - start).where(is_local, 0), weight)
    return parallel.reduce(rows.masked_fill(~is_local[:, None], 0))


def join_vocab_shards(shards: Tensor, vocab_size: int, size: int) -> Tensor:
    """Turn all ranks' columns of their `vocab_shard`, side by side, into ``[rows, vocab]`` without duplicates."""
    width = shards.shape[-1] // size
    if width * size == vocab_size:
        return shards
    num_whole = vocab_size // width
    end, rest = (num_whole + 1) * width, vocab_size - num_whole * width
    return torch.cat([shards[:, : num_whole * width], shards[:, end - rest : end]], dim=-1)

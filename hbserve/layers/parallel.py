"""Layers that a tensor-parallel group computes together (Shoeybi et al. 2019, Megatron-LM).

Column-parallel layers need nothing: their weights are shards and their outputs stay sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Collective = Callable[[torch.Tensor], torch.Tensor]
SummandPlace = Callable[[tuple[int, ...], torch.dtype], torch.Tensor | None]
SumAndNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Of summand, residual, weight, epsilon: adds the sum to the residual, in place, and returns the RMS norm of that."""


@dataclass(frozen=True)
class TensorParallel:
    """One rank of a group.

    Attributes:
        all_reduce: sums a tensor over the ranks; called where ``size`` is above 1.
        all_gather: joins the ranks' tensors along the last dimension, in rank order; likewise.
        summand_place: memory where `all_reduce` sums the quickest, for a tensor of a shape and dtype, one of two in
            turn: a sum lies there until the second after it is asked for. None if it has none for such a tensor.
        sum_and_norm: sums what lies in a `summand_place` over the ranks and goes on to the next norm, in one.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Collective | None = None
    all_gather: Collective | None = None
    summand_place: SummandPlace | None = None
    sum_and_norm: SumAndNorm | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over the ranks."""
        if self.size == 1:
            return x
        assert self.all_reduce is not None, "a group of several ranks needs its all_reduce"
        return self.all_reduce(x)

    def summand(self, rows: int, weight: torch.Tensor) -> torch.Tensor | None:
        """Memory to multiply ``rows`` rows with ``weight [out, in]`` into, for `reduce`; None: anywhere."""
        if self.summand_place is None:
            return None
        return self.summand_place((rows, weight.shape[0]), weight.dtype)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of all ranks, side by side in the last dimension."""
        if self.size == 1:
            return x
        assert self.all_gather is not None, "a group of several ranks needs its all_gather"
        return self.all_gather(x)

    def minimum(self, x: torch.Tensor) -> torch.Tensor:
        """The least of each element of the vector ``x`` over the ranks."""
        return self.gather(x).view(self.size, -1).amin(0)


def vocab_shard(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    """The rows ``start .. stop`` of the embedding and the LM head that a rank holds, as many as every other rank.

    Where the ranks cannot share evenly, the last ones begin earlier: some of their rows are another's, too. The number
    of each one's rows is then a multiple of 8, as matrix products want it.
    """
    num_rows = vocab_size // size if vocab_size % size == 0 else min(-(-vocab_size // (8 * size)) * 8, vocab_size)
    start = min(rank * num_rows, vocab_size - num_rows)
    return start, start + num_rows


def vocab_parallel_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, vocab_size: int, parallel: TensorParallel
) -> torch.Tensor:
    """Rows ``[tokens, hidden]`` of an embedding of which this rank has the `vocab_shard` ``weight``."""
    if parallel.size == 1:
        return F.embedding(token_ids, weight)
    start, _ = vocab_shard(vocab_size, parallel.rank, parallel.size)
    is_local = token_ids // weight.shape[0] == parallel.rank
    rows = F.embedding((token_ids - start).where(is_local, 0), weight)
    return parallel.reduce(rows.masked_fill(~is_local[:, None], 0))


def join_vocab_shards(shards: torch.Tensor, vocab_size: int, size: int) -> torch.Tensor:
    """``[rows, vocab]`` of what all ranks have for their `vocab_shard`, side by side in the last dimension."""
    width = shards.shape[-1] // size
    if width * size == vocab_size:
        return shards
    num_whole = vocab_size // width
    end, rest = (num_whole + 1) * width, vocab_size - num_whole * width
    return torch.cat([shards[:, : num_whole * width], shards[:, end - rest : end]], dim=-1)

"""Which KV heads go from which rank to which, and where in a block they lie.

Two instances may share a model by different numbers of ranks. A block of a rank holds a row of its
heads for every layer, key or value, and token, ``[layer, k/v, token, kv head, head dim]``, so the
heads that two ranks have in common are a *part* of each row: the same one of ``parts`` equal parts
in all of them. What one rank sends another is one such part of each block, and on at least one of
the two sides it is the whole block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hbserve.kv_cache.layout import KVLayout


@dataclass(frozen=True)
class Shard:
    """A rank's share of the KV heads.

    Attributes:
        rank, size: which of how many ranks of its instance.
        num_kv_heads: of the model; with fewer of them than ranks, neighbours hold the same head.
        num_rows: of heads in a block: layers, times keys and values, times tokens.
    """

    rank: int = 0
    size: int = 1
    num_kv_heads: int = 1
    num_rows: int = 1

    @staticmethod
    def of_rank(rank: int, size: int, num_kv_heads: int, layout: KVLayout) -> Shard:
        """Of a rank with that layout of its KV cache."""
        return Shard(rank, size, num_kv_heads, layout.num_layers * 2 * layout.block_size)

    def outgoing(self, num_targets: int) -> list[Route]:
        """What this rank sends to an instance of ``num_targets`` ranks; nothing if another has the same heads."""
        return [route for route in routes(self.num_kv_heads, self.size, num_targets) if route.source == self.rank]

    def incoming(self, num_sources: int) -> list[Route]:
        """What this rank receives from an instance of ``num_sources`` ranks: together all of each block."""
        return [route for route in routes(self.num_kv_heads, num_sources, self.size) if route.target == self.rank]


@dataclass(frozen=True, order=True)
class Part:
    """One of equal parts of every row of a block."""

    index: int
    count: int


WHOLE = Part(0, 1)


class Route(NamedTuple):
    """A part of each block of rank ``source`` that becomes a part of each block of rank ``target``."""

    source: int
    target: int
    source_part: Part
    target_part: Part


@lru_cache(maxsize=64)
def routes(num_kv_heads: int, num_sources: int, num_targets: int) -> tuple[Route, ...]:
    """All that goes from an instance of ``num_sources`` ranks to one of ``num_targets``.

    Every rank of the target gets each of its heads once. Of several ranks that hold a head, the target's
    holders of it take turns, so that equal numbers of ranks exchange rank by rank.
    """
    source_heads, target_heads = (max(1, num_kv_heads // size) for size in (num_sources, num_targets))
    width = min(source_heads, target_heads)
    assert source_heads % width == 0, "numbers of ranks are powers of two, and heads are shared evenly"
    assert target_heads % width == 0, "numbers of ranks are powers of two, and heads are shared evenly"
    source_copies, target_copies = (max(1, size // num_kv_heads) for size in (num_sources, num_targets))
    found = []
    for target in range(num_targets):
        first_head = target // target_copies * target_heads
        for head in range(first_head, first_head + target_heads, width):
            holder = head // source_heads * source_copies + target % target_copies % source_copies
            found.append(
                Route(
                    holder,
                    target,
                    Part(head % source_heads // width, source_heads // width),
                    Part((head - first_head) // width, target_heads // width),
                )
            )
    return tuple(found)

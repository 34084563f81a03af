"""The parts of blocks that go from each rank of the sender to each rank of the receiver. Pure functions.

Two instances may split a model over different numbers of ranks. A block of a rank holds one row of KV heads for every
layer, key or value, and token: ``[layer, k/v, token, kv head, head dim]``. The heads that two ranks have in common are
therefore one *part* of each row: the same one of some equal parts in all rows. Each rank sends each other rank one such
part of every block. On at least one of the two sides the part is the whole block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hbserve.kv_cache.layout import KVLayout


@dataclass(frozen=True)
class Shard:
    """Share of the KV heads that one rank holds.

    Attributes:
        rank, size: number of the rank, and of the ranks of its instance.
        num_kv_heads: KV heads of the model; with fewer heads than ranks, neighbouring ranks hold the same head.
        num_rows: rows of heads in a block: layers, times keys and values, times tokens.
    """

    rank: int = 0
    size: int = 1
    num_kv_heads: int = 1
    num_rows: int = 1

    @staticmethod
    def of_rank(rank: int, size: int, num_kv_heads: int, layout: KVLayout) -> Shard:
        """Make the shard of a rank whose KV cache has this layout."""
        return Shard(rank, size, num_kv_heads, layout.num_stored_layers * 2 * layout.block_size)

    def outgoing(self, num_targets: int) -> list[Route]:
        """List what this rank sends to an instance of ``num_targets`` ranks; nothing if another rank sends the same
        heads."""
        return [route for route in routes(self.num_kv_heads, self.size, num_targets) if route.source == self.rank]

    def incoming(self, num_sources: int) -> list[Route]:
        """List what this rank receives from an instance of ``num_sources`` ranks: together all of each block."""
        return [route for route in routes(self.num_kv_heads, num_sources, self.size) if route.target == self.rank]


@dataclass(frozen=True, order=True)
class Part:
    """One of ``count`` equal parts of every row of a block."""

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
    """List all routes from an instance of ``num_sources`` ranks to one of ``num_targets``.

    Every rank of the target gets each of its heads once. If several source ranks hold a head, the target ranks that
    need it take turns among them. So instances of equal size exchange rank by rank.
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

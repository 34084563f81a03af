"""The one allocator of a KV pool.

Who may hold a block, and what it may become next::

      allocate            release, no pin left
    free ─────────► owned ──────────────────► free       contents of no use
      ▲               │ release, sealed block
      │ evicted (LRU) ▼
      └─────────── cached ──► owned again, by prefix match

"Owned" is a reference count: equal prefixes share sealed (full, immutable) blocks. A *pin* is a step
or transfer in flight that may still touch a request's blocks; blocks of a released request stay
owned until its last pin is gone. Every return to free or cached ends the block's *generation*, so
that a reference kept beyond it is found out.

Single-threaded on purpose: the CPU scheduler is the only owner, so no operation needs a lock and
each is atomic.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hbserve.config import InstanceRole
from hbserve.errors import StaleBlockError

if TYPE_CHECKING:
    import torch


class BlockHandle(NamedTuple):
    """A reference to a block that can be told from one to its earlier or later contents."""

    block_id: int
    generation: int


@dataclass(slots=True)
class _Holding:
    """What one request holds: its block table, and what keeps it alive."""

    block_ids: list[int] = field(default_factory=list)
    pins: int = 0
    released: bool = False


class BlockPool:
    """Allocates, shares and frees the blocks of one KV pool; moves no bytes.

    Args:
        total_blocks: blocks in the pool.
        block_size: tokens per block.
        device: where the arena lies; kept for information.
        enable_prefix_caching: keep sealed blocks for reuse after they are released.
    """

    def __init__(
        self,
        total_blocks: int,
        block_size: int,
        device: torch.device | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self.device = device
        self.enable_prefix_caching = enable_prefix_caching
        self.decode_headroom_blocks = 0
        """Blocks that only running decodes may take; kept by the scheduler."""
        # A heap: lowest first, so that a request's blocks lie together and transfers move them in few pieces.
        self._free = list(range(total_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unowned but sealed, oldest first
        self._by_hash: dict[bytes, int] = {}
        self._hash: list[bytes | None] = [None] * total_blocks
        self._references = [0] * total_blocks
        self._generation = [0] * total_blocks
        self._holdings: dict[str, _Holding] = {}
        self.num_pending_blocks = 0
        """Blocks of released requests that pins still hold back."""

    # --- allocation ------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation can take, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Unowned blocks whose contents can be reused."""
        return len(self._cached)

    def allocate_blocks(
        self,
        request_id: str,
        num_blocks: int,
        requester_role: InstanceRole = InstanceRole.DECODE,
        prefix_hashes: Sequence[bytes] = (),
    ) -> list[int] | None:
        """Append ``num_blocks`` blocks to a request's table, all or none.

        Args:
            requester_role: prefill leaves ``decode_headroom_blocks`` untouched.
            prefix_hashes: of the blocks' wished contents, for a new request; the leading ones that
                the pool has are shared instead of taken fresh (`count_cached_prefix` says how many).

        Returns:
            The appended block ids, shared ones first, or None if the pool has too few.
        """
        hits = [self._by_hash[h] for h in prefix_hashes[: self.count_cached_prefix(prefix_hashes[:num_blocks])]]
        revived = sum(self._references[block] == 0 for block in hits)
        available = self.num_free_blocks - revived
        if requester_role is InstanceRole.PREFILL:
            available -= self.decode_headroom_blocks
        if num_blocks - len(hits) > available:
            return None
        for block in hits:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        fresh = [self._take_free() for _ in range(num_blocks - len(hits))]
        holding = self._holdings.setdefault(request_id, _Holding())
        assert not holding.released, f"{request_id} allocates after its release"
        assert not (hits and holding.block_ids), "a prefix match is for a new request"
        holding.block_ids += hits
        holding.block_ids += fresh
        return hits + fresh

    def _take_free(self) -> int:
        if self._free:
            block = heapq.heappop(self._free)
        else:
            block, _ = self._cached.popitem(last=False)
            stale = self._hash[block]
            assert stale is not None
            del self._by_hash[stale]
            self._hash[block] = None
        self._references[block] = 1
        return block

    def free(self, request_id: str) -> None:
        """Release all that a request holds; blocks return when its last pin is gone.

        Unknown requests are ignored, so that every way to end a request may call this.
        """
        holding = self._holdings.get(request_id)
        if holding is None or holding.released:
            return
        holding.released = True
        if holding.pins:
            self.num_pending_blocks += len(holding.block_ids)
        else:
            self._free_now(request_id, holding)

    def _free_now(self, request_id: str, holding: _Holding) -> None:
        del self._holdings[request_id]
        # The tail first: eviction takes the oldest, and a prefix is of more use than what follows it.
        for block in reversed(holding.block_ids):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._generation[block] += 1
            if self._hash[block] is None:
                heapq.heappush(self._free, block)
            else:
                self._cached[block] = None

    # --- pins ------------------------------------------------------------------------------------

    def pin(self, request_id: str) -> None:
        """A step or transfer that may touch the request's blocks is in flight."""
        self._holdings[request_id].pins += 1

    def unpin(self, request_id: str) -> None:
        """That step or transfer is confirmed over."""
        holding = self._holdings[request_id]
        assert holding.pins > 0, f"{request_id} is unpinned more often than pinned"
        holding.pins -= 1
        if holding.released and not holding.pins:
            self.num_pending_blocks -= len(holding.block_ids)
            self._free_now(request_id, holding)

    # --- prefix cache ----------------------------------------------------------------------------

    def count_cached_prefix(self, prefix_hashes: Sequence[bytes]) -> int:
        """How many leading blocks of these contents the pool has."""
        if not self.enable_prefix_caching:
            return 0
        for count, block_hash in enumerate(prefix_hashes):
            if block_hash not in self._by_hash:
                return count
        return len(prefix_hashes)

    def seal_block(self, request_id: str, index: int, block_hash: bytes) -> None:
        """The request's block at ``index`` is full and computed: from now on immutable and sharable."""
        if not self.enable_prefix_caching:
            return
        holding = self._holdings[request_id]
        block = holding.block_ids[index]
        if self._hash[block] is None and block_hash not in self._by_hash and not holding.released:
            self._hash[block] = block_hash
            self._by_hash[block_hash] = block

    def share_blocks(self, source_request_id: str, target_request_id: str) -> list[int]:
        """Give a new request the leading sealed blocks of another.

        Returns:
            The shared block ids, in order; empty if the source has sealed none.

        Raises:
            KeyError: if the source holds nothing.
        """
        shared: list[int] = []
        for block in self._holdings[source_request_id].block_ids:
            if self._hash[block] is None:
                break
            shared.append(block)
        holding = self._holdings.setdefault(target_request_id, _Holding())
        assert not holding.block_ids, f"{target_request_id} already holds blocks"
        for block in shared:
            self._references[block] += 1
        holding.block_ids += shared
        return shared

    # --- references ------------------------------------------------------------------------------

    def get_block_ids(self, request_id: str) -> list[int]:
        """The request's block table; the list itself, not to be changed by the caller."""
        return self._holdings[request_id].block_ids

    def get_block_handles(self, request_id: str) -> list[BlockHandle]:
        """References to the request's blocks that can be checked later."""
        return [BlockHandle(block, self._generation[block]) for block in self.get_block_ids(request_id)]

    def generations_of(self, block_ids: Sequence[int]) -> list[int]:
        """Current generations of blocks."""
        return [self._generation[block] for block in block_ids]

    def check_handles(self, handles: Sequence[BlockHandle]) -> None:
        """Refuse references to contents that are gone.

        Raises:
            StaleBlockError: naming the first stale block.
        """
        for block, generation in handles:
            if self._generation[block] != generation or self._references[block] == 0:
                raise StaleBlockError(
                    f"block {block} generation {generation} is over (it is at {self._generation[block]}, "
                    f"{self._references[block]} owners)"
                )

    def check_consistency(self) -> None:
        """Assert that every block is in exactly one place and counted right. For tests and debugging."""
        owners = [0] * self.total_blocks
        for holding in self._holdings.values():
            assert len(set(holding.block_ids)) == len(holding.block_ids), "a block stands twice in one table"
            for block in holding.block_ids:
                owners[block] += 1
        assert owners == self._references, "reference counts do not match the tables"
        unowned = sorted([*self._free, *self._cached])
        assert unowned == [block for block in range(self.total_blocks) if not owners[block]], "leaked or doubly free"
        for block_hash, block in self._by_hash.items():
            assert self._hash[block] == block_hash, "hash index and block disagree"
        assert all(self._hash[block] is not None for block in self._cached), "a cached block has no hash"
        pending = [len(h.block_ids) for h in self._holdings.values() if h.released]
        assert sum(pending) == self.num_pending_blocks, "pending blocks are miscounted"
        assert all(h.pins for h in self._holdings.values() if h.released), "a released holding without pins stays"

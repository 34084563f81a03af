"""The allocator of a KV pool. It runs in the scheduler's process, in the thread of the event loop.

A block is in one of five states. `TRANSITIONS` lists all legal changes, which this diagram shows::

         allocate           seal
    free ───────► owned ────────────► sealed ◄───────────────┐
     ▲             │ │                  │ │                  │
     │ free        │ │ free, pinned     │ │ free             │ allocate or share:
     ├─────────────┘ └────► pending ◄───┘ └──────► cached ───┤ same contents
     │ unpin, unsealed       │ │ │ unpin, sealed    ▲  │     │
     └───────────────────────┘ │ └──────────────────┘  │     │
                               └───────────────────────┼─────┘
                                                       └─────► owned   allocate: evicted if no block is free

- *owned*: at least one owner has the block in its block table. An owner is one attempt of a request, or a copy of
  sealed blocks to a KV tier (`BlockPool.hold`).
- *sealed*: owned, full, computed and immutable. Owners with equal prefixes share the block; it counts its owners.
- *pending*: every owner has been freed, but a *pin* of one of them is left. A pin is a step or transfer in flight
  that may still touch the owner's blocks.
- *cached*: without an owner, and its sealed contents can be used again.

An owned block may be *planned*: a step that fills it is on its way to a worker. Later steps may read it, and so may
other rows of the same step. So other owners can join it before it is sealed (`BlockPool.join_blocks`).

Memory is freed in `BlockPool.free`, or, if the owner has pins, in the `BlockPool.unpin` that drops the last one. Both
call `BlockPool._free_now`. Each block that becomes free or cached there begins a new *generation*, so that an older
`BlockHandle` is recognized as stale.

Only the scheduler uses the pool and from one thread, so no operation needs a lock and each one is atomic. For programs
with threads there is `hbserve.semi_pd.unified_storage_manager`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from hbserve.config import InstanceRole
from hbserve.errors import StaleBlockError
from hbserve.kv_cache.block_contents import PlannedBlocks

if TYPE_CHECKING:
    import torch


class BlockState(Enum):
    """State of a block; the pool stores none, it follows from its lists (`BlockPool.block_states`)."""

    FREE = "free"
    OWNED = "owned"
    SEALED = "sealed"
    PENDING = "pending"
    CACHED = "cached"


TRANSITIONS = frozenset(
    {
        (BlockState.FREE, "allocate", BlockState.OWNED),
        (BlockState.CACHED, "allocate", BlockState.OWNED),  # evicted, because no block is free
        (BlockState.CACHED, "allocate", BlockState.SEALED),  # a prefix match
        (BlockState.PENDING, "allocate", BlockState.SEALED),  # a prefix match with a sealed block
        (BlockState.PENDING, "share", BlockState.SEALED),  # likewise
        (BlockState.PENDING, "join", BlockState.SEALED),  # likewise
        (BlockState.PENDING, "join", BlockState.OWNED),  # a step that is on its way fills it
        (BlockState.CACHED, "join", BlockState.SEALED),  # it was sealed after the owner's blocks were allocated
        (BlockState.OWNED, "join", BlockState.FREE),  # the owner takes another block in its place
        (BlockState.OWNED, "seal", BlockState.SEALED),
        (BlockState.OWNED, "free", BlockState.FREE),
        (BlockState.OWNED, "free", BlockState.PENDING),  # its owner has pins
        (BlockState.SEALED, "free", BlockState.CACHED),  # by its last owner
        (BlockState.SEALED, "free", BlockState.PENDING),  # the last owner, or one freed before, has pins
        (BlockState.PENDING, "unpin", BlockState.FREE),  # the last pin; not sealed
        (BlockState.PENDING, "unpin", BlockState.CACHED),  # the last pin; sealed
    }
)
"""Every legal change of a block's state: before, operation of the pool, after."""


class BlockHandle(NamedTuple):
    """Reference to a block's contents: its generation tells them from earlier and later ones."""

    block_id: int
    generation: int


@dataclass(slots=True)
class _Holding:
    """The block table of one owner, and what keeps its blocks from being freed."""

    block_ids: list[int] = field(default_factory=list)
    pins: int = 0
    is_freed: bool = False


class BlockPool:
    """Allocates, shares and frees the blocks of one KV pool; moves no bytes.

    Args:
        total_blocks: blocks in the pool.
        block_size: tokens per block.
        device: where the arena lies; kept for information.
        enable_prefix_caching: keep sealed blocks for reuse after they are freed.
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
        """Blocks that only running decodes may take; written by the scheduler's admission."""
        # A heap gives out the lowest blocks first: a request's blocks are neighbours, and transfers move fewer pieces.
        self._free_blocks = list(range(total_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently freed block first
        self._block_of_hash: dict[bytes, int] = {}
        self._hash: list[bytes | None] = [None] * total_blocks  # of sealed contents
        self._owners = [0] * total_blocks  # how many
        self._generation = [0] * total_blocks
        self._holdings: dict[str, _Holding] = {}
        self._planned = PlannedBlocks()
        self._read: set[int] = set()  # sealed blocks with KV of the draft model
        self.num_pending_blocks = 0
        """Blocks in the tables of freed owners that have pins."""

    # --- allocation ------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation can take: free and cached ones."""
        return len(self._free_blocks) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks without an owner whose contents can be used again."""
        return len(self._cached)

    def allocate_blocks(
        self,
        owner: str,
        num_blocks: int,
        requester_role: InstanceRole = InstanceRole.DECODE,
        prefix_hashes: Sequence[bytes] = (),
    ) -> list[int] | None:
        """Append ``num_blocks`` blocks to an owner's table, all or none.

        Args:
            owner: new, or one that has not been freed.
            requester_role: prefill leaves ``decode_headroom_blocks`` untouched.
            prefix_hashes: hashes of the wanted contents, for a new owner. The leading blocks that the pool has are
                shared, the others are fresh (`count_cached_prefix` says how many are shared).

        Returns:
            The appended block ids, shared ones first, or None if the pool has too few.
        """
        hits = self._hits(prefix_hashes[:num_blocks])
        if not self._has_room(num_blocks, hits, requester_role):
            return None
        holding = self._holdings.setdefault(owner, _Holding())
        assert not holding.is_freed, f"{owner} allocates after it was freed"
        assert not (hits and holding.block_ids), f"{owner} has blocks already; a prefix match is for a new owner"
        for block in hits:
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1
        fresh = [self._take_free() for _ in range(num_blocks - len(hits))]
        holding.block_ids += hits
        holding.block_ids += fresh
        return hits + fresh

    def can_allocate(
        self, num_blocks: int, requester_role: InstanceRole = InstanceRole.DECODE, prefix_hashes: Sequence[bytes] = ()
    ) -> bool:
        """Whether `allocate_blocks` would find enough blocks."""
        return self._has_room(num_blocks, self._hits(prefix_hashes[:num_blocks]), requester_role)

    def _hits(self, prefix_hashes: Sequence[bytes]) -> list[int]:
        return [self._block_of_hash[h] for h in prefix_hashes[: self.count_cached_prefix(prefix_hashes)]]

    def _has_room(self, num_blocks: int, hits: list[int], requester_role: InstanceRole) -> bool:
        available = self.num_free_blocks - sum(self._owners[block] == 0 for block in hits)
        if requester_role is InstanceRole.PREFILL:
            available -= self.decode_headroom_blocks
        return num_blocks - len(hits) <= available

    def _take_free(self) -> int:
        if self._free_blocks:
            block = heapq.heappop(self._free_blocks)
        else:
            block, _ = self._cached.popitem(last=False)
            evicted = self._hash[block]
            assert evicted is not None
            del self._block_of_hash[evicted]
            self._hash[block] = None
        self._owners[block] = 1
        self._read.discard(block)
        return block

    # --- the draft model's KV ----------------------------------------------------------------------

    def note_read(self, block_ids: Sequence[int]) -> None:
        """Note that the draft model has read all tokens of these sealed blocks."""
        self._read.update(block_ids)

    def count_read(self, block_ids: Sequence[int]) -> int:
        """Return how many of these blocks, from the first on, the draft model has read."""
        return next((place for place, block in enumerate(block_ids) if block not in self._read), len(block_ids))

    # --- freeing and pins ------------------------------------------------------------------------

    def free(self, owner: str) -> None:
        """Free all blocks of an owner: now if it has no pins, else when `unpin` drops its last pin.

        An unknown or already freed owner is ignored, so every path that ends a request may call this.
        """
        holding = self._holdings.get(owner)
        if holding is None or holding.is_freed:
            return
        holding.is_freed = True
        if holding.pins:
            self.num_pending_blocks += len(holding.block_ids)
        else:
            self._free_now(owner, holding)

    def pin(self, owner: str) -> None:
        """Keep an owner's blocks from being freed, because a step or transfer that may touch them starts."""
        self._holdings[owner].pins += 1

    def unpin(self, owner: str) -> None:
        """Drop one pin, because its step or transfer is confirmed over; the last one frees if `free` was called."""
        holding = self._holdings[owner]
        assert holding.pins > 0, f"{owner} is unpinned more often than pinned"
        holding.pins -= 1
        if holding.is_freed and not holding.pins:
            self.num_pending_blocks -= len(holding.block_ids)
            self._free_now(owner, holding)

    def _free_now(self, owner: str, holding: _Holding) -> None:
        """Take an owner's blocks from it; a block without another owner becomes free, or cached if it is sealed."""
        del self._holdings[owner]
        # The tail first: eviction takes the oldest, and the beginning of a prompt is of more use than its end.
        for block in reversed(holding.block_ids):
            self._drop_owner(block)

    def _drop_owner(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block]:
            return
        self._generation[block] += 1
        if self._hash[block] is None:
            self._planned.forget(block)
            heapq.heappush(self._free_blocks, block)
        else:
            self._cached[block] = None

    # --- prefix cache ----------------------------------------------------------------------------

    def count_cached_prefix(self, prefix_hashes: Sequence[bytes]) -> int:
        """Count the leading blocks of these contents that the pool has."""
        if not self.enable_prefix_caching:
            return 0
        for count, block_hash in enumerate(prefix_hashes):
            if block_hash not in self._block_of_hash:
                return count
        return len(prefix_hashes)

    def seal_block(self, owner: str, index: int, block_hash: bytes) -> None:
        """Seal an owner's block at ``index``: it is full and computed, and from now on immutable and sharable.

        Does nothing if the owner has been freed and has pins, the block is sealed, or another block has these contents.

        Raises:
            KeyError: if the owner has no blocks, because it is unknown or its blocks have been freed.
        """
        if not self.enable_prefix_caching:
            return
        holding = self._holdings[owner]
        if holding.is_freed:
            return
        block = holding.block_ids[index]
        self._planned.forget(block)
        if self._hash[block] is None and block_hash not in self._block_of_hash:
            self._hash[block] = block_hash
            self._block_of_hash[block_hash] = block

    def share_blocks(self, source: str, target: str, *, only_sealed: bool = True) -> list[int]:
        """Give a new owner the leading sealed blocks of another.

        Args:
            only_sealed: False shares all blocks; the caller then sees to it that one owner at most writes them.

        Returns:
            The shared block ids, in order; empty if the source has sealed none.

        Raises:
            KeyError: if the source has no blocks.
        """
        shared: list[int] = []
        for block in self._holdings[source].block_ids:
            if only_sealed and self._hash[block] is None:
                break
            shared.append(block)
        assert target not in self._holdings or not self._holdings[target].block_ids, f"{target} has blocks already"
        for block in shared:
            self._owners[block] += 1
        self._holdings.setdefault(target, _Holding()).block_ids += shared
        return shared

    def hold(self, holder: str, hashes: Sequence[bytes]) -> list[int]:
        """Make a copy out of the pool an owner of sealed blocks, so that they keep their contents; return their ids.

        Args:
            holder: new.
            hashes: contents that the pool has.
        """
        blocks = self.allocate_blocks(holder, len(hashes), prefix_hashes=hashes)
        assert blocks is not None, "the pool has these contents"
        return blocks

    def let_go(self, holder: str) -> None:
        """End a `hold`."""
        self._free_now(holder, self._holdings[holder])

    # --- blocks that are being computed ------------------------------------------------------------

    def note_planned(self, block_ids: Sequence[int], block_hashes: Sequence[bytes]) -> None:
        """Note that a step on its way to a worker fills these blocks with these contents."""
        if not self.enable_prefix_caching:
            return
        for block, block_hash in zip(block_ids, block_hashes, strict=True):
            if block_hash not in self._block_of_hash:
                self._planned.add(block, block_hash)

    def find_joinable(self, block_hashes: Sequence[bytes], first: int, end: int) -> int:
        """Return the end of the contents from ``first`` to at most ``end`` that the pool has, or that steps fill."""
        planned, sealed = self._planned, self._block_of_hash
        while first < end and (block_hashes[first] in sealed or block_hashes[first] in planned):
            first += 1
        return first

    def join_blocks(self, owner: str, first: int, block_hashes: Sequence[bytes]) -> None:
        """Put the blocks of these contents in the place of an owner's from ``first`` on, as `find_joinable` found them.

        The owner's own blocks there become free. No step or transfer may touch them: a pin is not heeded.
        """
        table = self._holdings[owner].block_ids
        for index, block_hash in enumerate(block_hashes, first):
            block = self._block_of_hash.get(block_hash)
            if block is None:
                block = self._planned[block_hash]
            replaced = table[index]
            if block != replaced:
                if self._owners[block] == 0:
                    del self._cached[block]
                self._owners[block] += 1
                table[index] = block
                self._drop_owner(replaced)

    def forget_planned(self) -> None:
        """Share no block that is planned now before it is sealed: the step that was to fill it may have been lost."""
        self._planned.clear()

    # --- block tables and handles ----------------------------------------------------------------

    def get_block_ids(self, owner: str) -> list[int]:
        """Return the owner's block table: the list itself, which the caller must not change."""
        return self._holdings[owner].block_ids

    def get_block_handles(self, owner: str) -> list[BlockHandle]:
        """Return references to the owner's blocks that `check_handles` can check later."""
        return [BlockHandle(block, self._generation[block]) for block in self.get_block_ids(owner)]

    def generations_of(self, block_ids: Sequence[int]) -> list[int]:
        """Return the current generations of blocks."""
        return [self._generation[block] for block in block_ids]

    def check_handles(self, handles: Sequence[BlockHandle]) -> None:
        """Check that the contents of every handle still exist.

        Raises:
            StaleBlockError: naming the first stale block.
        """
        for block, generation in handles:
            if self._generation[block] != generation or self._owners[block] == 0:
                raise StaleBlockError(
                    f"block {block} generation {generation} is over (it is at {self._generation[block]}, "
                    f"{self._owners[block]} owners)"
                )

    # --- for tests and debugging -----------------------------------------------------------------

    def block_states(self) -> list[BlockState]:
        """Return the state of every block, by block id; takes time in proportion to the pool."""
        live = {block for holding in self._holdings.values() if not holding.is_freed for block in holding.block_ids}
        states = []
        for block, (owners, contents) in enumerate(zip(self._owners, self._hash, strict=True)):
            if owners == 0:
                states.append(BlockState.FREE if contents is None else BlockState.CACHED)
            elif block not in live:
                states.append(BlockState.PENDING)
            else:
                states.append(BlockState.OWNED if contents is None else BlockState.SEALED)
        return states

    def check_consistency(self) -> None:
        """Assert that all lists agree on the state of every block, and that the counts are right."""
        owners = [0] * self.total_blocks
        for holding in self._holdings.values():
            assert len(set(holding.block_ids)) == len(holding.block_ids), "a block stands twice in one table"
            assert holding.pins >= 0, "an owner has a negative number of pins"
            for block in holding.block_ids:
                owners[block] += 1
        assert owners == self._owners, "numbers of owners do not match the tables"
        states = list(enumerate(self.block_states()))
        free = [block for block, state in states if state is BlockState.FREE]
        assert sorted(self._free_blocks) == free, "a block is leaked, or free twice"
        cached = [block for block, state in states if state is BlockState.CACHED]
        assert sorted(self._cached) == cached, "the cached blocks are not those with a hash and no owner"
        hashes = {contents: block for block, contents in enumerate(self._hash) if contents is not None}
        assert hashes == self._block_of_hash, "hash index and blocks disagree"
        planned = self._planned.blocks()
        assert all(owners[block] and self._hash[block] is None for block in planned), "a plan outlives its block"
        freed = [holding for holding in self._holdings.values() if holding.is_freed]
        assert sum(len(holding.block_ids) for holding in freed) == self.num_pending_blocks, "pending is miscounted"
        assert all(holding.pins for holding in freed), "a freed owner without pins still has blocks"

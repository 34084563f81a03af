"""The storage manager under random interleavings: no block leaked, doubly owned, or freed under a pin."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hbserve.config import InstanceRole
from hbserve.errors import StaleBlockError
from hbserve.kv_cache.block_pool import BlockHandle, BlockPool
from hbserve.kv_cache.prefix_hash import extend_block_hashes

BLOCK_SIZE = 4
TOTAL = 12


def hashes_of(token_ids: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, BLOCK_SIZE)
    return hashes


class StorageMachine(RuleBasedStateMachine):
    """A model of who holds what, kept beside the real manager."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockPool(TOTAL, BLOCK_SIZE)
        self.tables: dict[str, list[int]] = {}
        self.contents: dict[str, list[bytes]] = {}
        self.pins: dict[str, int] = {}
        self.released: set[str] = set()
        self.sealed: dict[int, bytes] = {}  # what each sealed block holds, while it may be reused
        self.stale: list[BlockHandle] = []
        self.count = 0

    def held(self) -> set[int]:
        return {block for table in self.tables.values() for block in table}

    @rule(target=requests, tokens=st.lists(st.integers(0, 1), max_size=20), role=st.sampled_from(InstanceRole))
    def allocate(self, tokens: list[int], role: InstanceRole) -> str:
        self.count += 1
        name = f"r{self.count}"
        hashes = hashes_of(tokens)
        num_blocks = len(tokens) // BLOCK_SIZE + 1
        cached = self.manager.count_cached_prefix(hashes)
        free_before = self.manager.num_free_blocks
        blocks = self.manager.allocate_blocks(name, num_blocks, role, hashes)
        if blocks is None:
            assert num_blocks - cached > free_before - self.manager.decode_headroom_blocks - cached
            assert self.manager.num_free_blocks == free_before
            return name
        for block, wished in zip(blocks[:cached], hashes, strict=False):
            assert self.sealed[block] == wished, "a prefix hit holds other contents"
        for block in blocks[cached:]:
            assert block not in self.held(), "a fresh block is owned by someone"
            self.sealed.pop(block, None)
        self.tables[name] = list(blocks)
        self.contents[name] = hashes
        self.pins[name] = 0
        return name

    @rule(name=requests)
    def grow(self, name: str) -> None:
        if name not in self.tables or name in self.released:
            return
        blocks = self.manager.allocate_blocks(name, 1)
        if blocks is None:
            assert self.manager.num_free_blocks == 0
            return
        assert blocks[0] not in self.held()
        self.sealed.pop(blocks[0], None)
        self.tables[name] += blocks

    @rule(name=requests)
    def seal(self, name: str) -> None:
        if name not in self.tables or name in self.released:
            return
        for index, block_hash in enumerate(self.contents[name]):
            known = self.manager.count_cached_prefix([block_hash])
            self.manager.seal_block(name, index, block_hash)
            if not known:
                self.sealed[self.tables[name][index]] = block_hash

    @rule(target=requests, name=requests)
    def share(self, name: str) -> str:
        self.count += 1
        target = f"r{self.count}"
        if name in self.tables and name not in self.released:
            shared = self.manager.share_blocks(name, target)
            assert shared == self.tables[name][: len(shared)]
            assert all(block in self.sealed for block in shared)
            self.tables[target] = list(shared)
            self.contents[target] = self.contents[name][: len(shared)]
            self.pins[target] = 0
        return target

    @rule(name=requests)
    def pin(self, name: str) -> None:
        if name in self.tables and name not in self.released:
            self.manager.pin(name)
            self.pins[name] += 1

    @rule(name=requests)
    def unpin(self, name: str) -> None:
        if self.pins.get(name):
            self.pins[name] -= 1
            self.manager.unpin(name)
            self.forget_if_over(name)

    @rule(name=consumes(requests))
    def abort(self, name: str) -> None:
        self.manager.free(name)
        self.manager.free(name)  # ending twice is harmless
        if name in self.tables:
            self.released.add(name)
            self.forget_if_over(name)

    @rule(data=st.data())
    def confirm_released(self, data: st.DataObject) -> None:
        pinned = sorted(name for name in self.released if self.pins[name])
        if pinned:
            self.unpin_released(data.draw(st.sampled_from(pinned)))

    def unpin_released(self, name: str) -> None:
        handles = self.manager.get_block_handles(name)
        self.pins[name] -= 1
        self.manager.unpin(name)
        self.forget_if_over(name)
        if name not in self.tables:
            still_held = self.held()
            self.stale += [handle for handle in handles if handle.block_id not in still_held]

    def forget_if_over(self, name: str) -> None:
        if name in self.released and not self.pins[name]:
            del self.tables[name], self.pins[name], self.contents[name]
            self.released.discard(name)

    @rule(blocks=st.integers(0, 3))
    def set_headroom(self, blocks: int) -> None:
        self.manager.decode_headroom_blocks = blocks

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_consistency()
        assert self.manager.num_free_blocks == TOTAL - len(self.held())
        for name, table in self.tables.items():
            assert self.manager.get_block_ids(name) == table

    @invariant()
    def stale_references_are_refused(self) -> None:
        for handle in self.stale:
            with pytest.raises(StaleBlockError):
                self.manager.check_handles([handle])


StorageMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStorageMachine = StorageMachine.TestCase


def test_pinned_blocks_are_not_reused() -> None:
    manager = BlockPool(2, BLOCK_SIZE)
    manager.allocate_blocks("a", 2)
    manager.pin("a")
    manager.free("a")
    assert manager.num_free_blocks == 0
    assert manager.num_pending_blocks == 2
    assert manager.allocate_blocks("b", 1) is None
    manager.unpin("a")
    assert manager.allocate_blocks("b", 2) is not None


def test_prefill_leaves_the_decode_headroom() -> None:
    manager = BlockPool(4, BLOCK_SIZE)
    manager.decode_headroom_blocks = 2
    assert manager.allocate_blocks("prompt", 3, InstanceRole.PREFILL) is None
    assert manager.allocate_blocks("prompt", 2, InstanceRole.PREFILL) is not None
    assert manager.allocate_blocks("running", 2, InstanceRole.DECODE) is not None


def test_least_recently_used_prefix_is_evicted_first_and_tail_before_root() -> None:
    manager = BlockPool(4, BLOCK_SIZE)
    old, new = hashes_of([1] * 8), hashes_of([2] * 8)
    for name, hashes in (("old", old), ("new", new)):
        manager.allocate_blocks(name, 2)
        for index, block_hash in enumerate(hashes):
            manager.seal_block(name, index, block_hash)
        manager.free(name)
    manager.allocate_blocks("x", 1)
    assert manager.count_cached_prefix(old) == 1
    assert manager.count_cached_prefix(new) == 2


def test_a_block_hash_covers_the_whole_prefix() -> None:
    assert hashes_of([1, 2, 3, 4, 9, 9, 9, 9])[1] != hashes_of([1, 2, 3, 5, 9, 9, 9, 9])[1]
    assert hashes_of([1, 2, 3]) == []


def test_prefix_caching_can_be_off() -> None:
    manager = BlockPool(4, BLOCK_SIZE, enable_prefix_caching=False)
    manager.allocate_blocks("a", 1)
    manager.seal_block("a", 0, hashes_of([1] * 4)[0])
    manager.free("a")
    assert manager.count_cached_prefix(hashes_of([1] * 4)) == 0

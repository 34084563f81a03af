"""The block pool: every legal transition of a block, the illegal ones, and random interleavings.

The legal transitions, by state before, operation, and state after (`SCENARIOS` has one pool for each):

    free    allocate  owned       sealed   free      cached
    cached  allocate  owned       sealed   free      pending
    cached  allocate  sealed      pending  allocate  sealed
    owned   seal      sealed      pending  share     sealed
    owned   free      free        pending  unpin     free
    owned   free      pending     pending  unpin     cached
    pending join      sealed      cached   join      sealed
    pending join      owned       owned    join      free
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hbserve.config import InstanceRole
from hbserve.errors import StaleBlockError
from hbserve.kv_cache.block_contents import extend_block_hashes
from hbserve.kv_cache.block_pool import TRANSITIONS, BlockHandle, BlockPool, BlockState

BLOCK_SIZE = 4
TOTAL = 12


def hashes_of(token_ids: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, BLOCK_SIZE)
    return hashes


# --- blocks that are being computed ---------------------------------------------------------------


def test_a_block_that_a_step_fills_can_be_joined_before_it_is_sealed() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    hashes = hashes_of([1] * 3 * BLOCK_SIZE)
    assert pool.allocate_blocks("leader", 3) == [0, 1, 2]
    assert pool.allocate_blocks("follower", 3) == [3, 4, 5]
    assert pool.find_joinable(hashes, 0, 3) == 0
    pool.note_planned([0, 1], hashes[:2])
    pool.seal_block("leader", 0, hashes[0])
    assert pool.find_joinable(hashes, 0, 3) == 2
    assert pool.find_joinable(hashes, 0, 1) == 1
    handles = pool.get_block_handles("follower")
    pool.join_blocks("follower", 0, hashes[:2])
    assert pool.get_block_ids("follower") == [0, 1, 5]
    assert pool.num_free_blocks == 4  # its own blocks are free again
    with pytest.raises(StaleBlockError):
        pool.check_handles(handles[:1])
    pool.check_consistency()
    pool.free("leader")
    assert pool.find_joinable(hashes, 0, 3) == 2  # the other owner keeps them
    pool.seal_block("follower", 1, hashes[1])
    pool.free("follower")
    assert pool.count_cached_prefix(hashes) == 2
    pool.check_consistency()


def test_a_cached_block_can_be_joined_and_a_block_without_an_owner_is_planned_no_more() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    hashes = hashes_of([1] * 2 * BLOCK_SIZE)
    pool.allocate_blocks("a", 2)
    pool.note_planned([0, 1], hashes)
    pool.seal_block("a", 0, hashes[0])
    pool.free("a")
    assert pool.find_joinable(hashes, 0, 2) == 1  # nothing says that the other one was ever filled
    pool.allocate_blocks("b", 2)
    pool.join_blocks("b", 0, hashes[:1])
    assert pool.get_block_ids("b")[0] == 0
    assert pool.block_states()[0] is BlockState.SEALED
    pool.note_planned(pool.get_block_ids("b")[1:], hashes[1:])
    pool.forget_planned()
    assert pool.find_joinable(hashes, 0, 2) == 1
    pool.check_consistency()


# --- transitions ----------------------------------------------------------------------------------

[CONTENTS] = hashes_of([1] * BLOCK_SIZE)
FREE, OWNED, SEALED, PENDING, CACHED = BlockState


def pool_with(*operations: Callable[[BlockPool], object]) -> BlockPool:
    """A pool of one block after some operations."""
    pool = BlockPool(1, BLOCK_SIZE)
    for operation in operations:
        operation(pool)
    return pool


def allocate(pool: BlockPool) -> None:
    assert pool.allocate_blocks("a", 1) == [0]


def allocate_same_contents(pool: BlockPool) -> None:
    assert pool.allocate_blocks("b", 1, prefix_hashes=[CONTENTS]) == [0]


def share(pool: BlockPool) -> None:
    assert pool.share_blocks("a", "b") == [0]


def seal(pool: BlockPool) -> None:
    pool.seal_block("a", 0, CONTENTS)


def pin(pool: BlockPool) -> None:
    pool.pin("a")


def unpin(pool: BlockPool) -> None:
    pool.unpin("a")


def free(pool: BlockPool) -> None:
    pool.free("a")


def free_other(pool: BlockPool) -> None:
    pool.free("b")


# What happens before, and as the last operation, the transition.
SCENARIOS: dict[tuple[BlockState, str, BlockState], list[list[Callable[[BlockPool], object]]]] = {
    (FREE, "allocate", OWNED): [[allocate]],
    (CACHED, "allocate", OWNED): [[allocate, seal, free, allocate]],
    (CACHED, "allocate", SEALED): [[allocate, seal, free, allocate_same_contents]],
    (PENDING, "allocate", SEALED): [[allocate, seal, pin, free, allocate_same_contents]],
    (PENDING, "share", SEALED): [[allocate, seal, pin, free, share]],
    (OWNED, "seal", SEALED): [[allocate, seal]],
    (OWNED, "free", FREE): [[allocate, free]],
    (OWNED, "free", PENDING): [[allocate, pin, free]],
    (SEALED, "free", CACHED): [[allocate, seal, free], [allocate, seal, share, free, free_other]],
    (SEALED, "free", PENDING): [[allocate, seal, pin, free], [allocate, seal, pin, share, free, free_other]],
    (PENDING, "unpin", FREE): [[allocate, pin, free, unpin], [allocate, pin, pin, unpin, free, unpin]],
    (PENDING, "unpin", CACHED): [[allocate, seal, pin, free, unpin]],
}


@pytest.mark.parametrize("transition", SCENARIOS, ids=lambda t: f"{t[0].value}-{t[1]}-{t[2].value}")
def test_a_legal_transition(transition: tuple[BlockState, str, BlockState]) -> None:
    before, _, after = transition
    for *earlier, last in SCENARIOS[transition]:
        pool = pool_with(*earlier)
        [generation] = pool.generations_of([0])
        assert pool.block_states() == [before]
        last(pool)
        assert pool.block_states() == [after]
        pool.check_consistency()
        begins_generation = after in (FREE, CACHED)
        assert pool.generations_of([0]) == [generation + begins_generation]


def allocate_other(pool: BlockPool) -> None:
    assert pool.allocate_blocks("b", 1) == [1]


def plan(pool: BlockPool) -> None:
    pool.note_planned([0], [CONTENTS])


def join(pool: BlockPool) -> None:
    pool.join_blocks("b", 0, [CONTENTS])
    assert pool.get_block_ids("b") == [0]


def plan_other_and_join(pool: BlockPool) -> None:
    pool.note_planned([1], [CONTENTS])
    pool.join_blocks("a", 0, [CONTENTS])
    assert pool.get_block_ids("a") == [1]


# The same for block 0 of two, where another owner joins it or its owner joins the other one.
JOINS: dict[tuple[BlockState, str, BlockState], list[Callable[[BlockPool], object]]] = {
    (PENDING, "join", SEALED): [allocate, allocate_other, seal, pin, free, join],
    (PENDING, "join", OWNED): [allocate, allocate_other, plan, pin, free, join],
    (CACHED, "join", SEALED): [allocate, allocate_other, seal, free, join],
    (OWNED, "join", FREE): [allocate, allocate_other, plan_other_and_join],
}


@pytest.mark.parametrize("transition", JOINS, ids=lambda t: f"{t[0].value}-{t[1]}-{t[2].value}")
def test_a_legal_join(transition: tuple[BlockState, str, BlockState]) -> None:
    before, _, after = transition
    *earlier, last = JOINS[transition]
    pool = BlockPool(2, BLOCK_SIZE)
    for operation in earlier:
        operation(pool)
    assert pool.block_states()[0] is before
    last(pool)
    assert pool.block_states()[0] is after
    pool.check_consistency()


def test_the_scenarios_are_all_legal_transitions() -> None:
    assert {*SCENARIOS, *JOINS} == TRANSITIONS


@pytest.mark.parametrize(
    ("earlier", "operation", "state"),
    [
        ([], free, FREE),  # never allocated
        ([allocate, free], free, FREE),
        ([allocate, seal, free], free, CACHED),
        ([allocate, pin, free], free, PENDING),  # it stays until the pin is dropped
        ([allocate, pin, free], seal, PENDING),  # late: a step is confirmed after its request has ended
        ([allocate, seal, pin, free], seal, PENDING),
        ([allocate, seal], seal, SEALED),
    ],
    ids=["unknown", "twice", "twice-sealed", "twice-pinned", "seal-freed", "seal-freed-sealed", "seal-twice"],
)
def test_an_operation_that_comes_twice_or_late_changes_nothing(
    earlier: list[Callable[[BlockPool], object]], operation: Callable[[BlockPool], object], state: BlockState
) -> None:
    pool = pool_with(*earlier)
    pending, generations = pool.num_pending_blocks, pool.generations_of([0])
    operation(pool)
    assert pool.block_states() == [state]
    assert (pool.num_pending_blocks, pool.generations_of([0])) == (pending, generations)
    pool.check_consistency()


@pytest.mark.parametrize(
    ("earlier", "operation", "error"),
    [
        ([allocate], unpin, AssertionError),
        ([allocate, pin, unpin], unpin, AssertionError),
        ([allocate, pin, free, unpin], unpin, KeyError),
        ([allocate, free], pin, KeyError),
        ([allocate, free], seal, KeyError),
        ([allocate, free], share, KeyError),
        ([allocate, pin, free], lambda pool: pool.allocate_blocks("a", 0), AssertionError),
        ([allocate, seal, share], share, AssertionError),
        ([allocate, seal], lambda pool: pool.allocate_blocks("a", 1, prefix_hashes=[CONTENTS]), AssertionError),
    ],
    ids=[
        "unpin-below-zero",
        "unpin-twice",
        "unpin-freed",
        "pin-freed",
        "seal-freed",
        "share-freed",
        "allocate-pending",
        "share-twice",
        "match-twice",
    ],
)
def test_an_illegal_operation_is_refused_and_changes_nothing(
    earlier: list[Callable[[BlockPool], object]], operation: Callable[[BlockPool], object], error: type[Exception]
) -> None:
    pool = pool_with(*earlier)
    states = pool.block_states()
    with pytest.raises(error):
        operation(pool)
    assert pool.block_states() == states
    pool.check_consistency()


def test_a_block_that_is_not_sealed_cannot_be_shared() -> None:
    pool = pool_with(allocate)
    assert pool.share_blocks("a", "b") == []
    assert pool.block_states() == [OWNED]


def test_a_handle_is_stale_once_its_block_was_freed() -> None:
    pool = pool_with(allocate, seal, pin)
    [handle] = pool.get_block_handles("a")
    free(pool)
    pool.check_handles([handle])  # pending: a transfer may still read it
    unpin(pool)
    for reuse in (lambda pool: None, allocate_same_contents):
        reuse(pool)
        with pytest.raises(StaleBlockError, match="block 0 generation 0 is over"):
            pool.check_handles([handle])


# --- random interleavings -------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """A model of the owners and their blocks, kept beside the real pool."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL, BLOCK_SIZE)
        self.tables: dict[str, list[int]] = {}
        self.contents: dict[str, list[bytes]] = {}
        self.pins: dict[str, int] = {}
        self.freed: set[str] = set()
        self.sealed: dict[int, bytes] = {}  # what each sealed block holds, while it may be reused
        self.stale: list[BlockHandle] = []
        self.count = 0
        self.states = self.pool.block_states()

    def check_transitions(self, operation: str) -> None:
        """All blocks that an operation has changed have made a legal transition."""
        before, self.states = self.states, self.pool.block_states()
        for old, new in zip(before, self.states, strict=True):
            assert old is new or (old, operation, new) in TRANSITIONS

    def held(self) -> set[int]:
        return {block for table in self.tables.values() for block in table}

    @rule(target=requests, tokens=st.lists(st.integers(0, 1), max_size=20), role=st.sampled_from(InstanceRole))
    def allocate(self, tokens: list[int], role: InstanceRole) -> str:
        self.count += 1
        name = f"r{self.count}"
        hashes = hashes_of(tokens)
        num_blocks = len(tokens) // BLOCK_SIZE + 1
        cached = self.pool.count_cached_prefix(hashes)
        free_before = self.pool.num_free_blocks
        blocks = self.pool.allocate_blocks(name, num_blocks, role, hashes)
        self.check_transitions("allocate")
        if blocks is None:
            assert num_blocks - cached > free_before - self.pool.decode_headroom_blocks - cached
            assert self.pool.num_free_blocks == free_before
            return name
        for block, wished in zip(blocks[:cached], hashes, strict=False):
            assert self.sealed[block] == wished, "a prefix hit holds other contents"
        for block in blocks[cached:]:
            assert block not in self.held(), "a fresh block has another owner"
            self.sealed.pop(block, None)
        self.tables[name] = list(blocks)
        self.contents[name] = hashes
        self.pins[name] = 0
        return name

    @rule(name=requests)
    def grow(self, name: str) -> None:
        if name not in self.tables or name in self.freed:
            return
        blocks = self.pool.allocate_blocks(name, 1)
        self.check_transitions("allocate")
        if blocks is None:
            assert self.pool.num_free_blocks == 0
            return
        assert blocks[0] not in self.held()
        self.sealed.pop(blocks[0], None)
        self.tables[name] += blocks

    @rule(name=requests)
    def seal(self, name: str) -> None:
        if name not in self.tables or name in self.freed:
            return
        for index, block_hash in enumerate(self.contents[name]):
            known = self.pool.count_cached_prefix([block_hash])
            self.pool.seal_block(name, index, block_hash)
            if not known:
                self.sealed[self.tables[name][index]] = block_hash
        self.check_transitions("seal")

    @rule(target=requests, name=requests)
    def share(self, name: str) -> str:
        self.count += 1
        target = f"r{self.count}"
        if name in self.tables:
            shared = self.pool.share_blocks(name, target)
            self.check_transitions("share")
            assert shared == self.tables[name][: len(shared)]
            assert all(block in self.sealed for block in shared)
            self.tables[target] = list(shared)
            self.contents[target] = self.contents[name][: len(shared)]
            self.pins[target] = 0
        return target

    @rule(name=requests)
    def pin(self, name: str) -> None:
        if name in self.tables and name not in self.freed:
            self.pool.pin(name)
            self.check_transitions("pin")
            self.pins[name] += 1

    @rule(name=requests)
    def unpin(self, name: str) -> None:
        if self.pins.get(name):
            self.pins[name] -= 1
            self.pool.unpin(name)
            self.check_transitions("unpin")
            self.forget_if_over(name)

    @rule(name=consumes(requests))
    def abort(self, name: str) -> None:
        self.pool.free(name)
        self.pool.free(name)  # ending twice is harmless
        self.check_transitions("free")
        if name in self.tables:
            self.freed.add(name)
            self.forget_if_over(name)

    @rule(data=st.data())
    def confirm_freed(self, data: st.DataObject) -> None:
        pinned = sorted(name for name in self.freed if self.pins[name])
        if pinned:
            self.unpin_freed(data.draw(st.sampled_from(pinned)))

    def unpin_freed(self, name: str) -> None:
        handles = self.pool.get_block_handles(name)
        self.pins[name] -= 1
        self.pool.unpin(name)
        self.check_transitions("unpin")
        self.forget_if_over(name)
        if name not in self.tables:
            still_held = self.held()
            self.stale += [handle for handle in handles if handle.block_id not in still_held]

    def forget_if_over(self, name: str) -> None:
        if name in self.freed and not self.pins[name]:
            del self.tables[name], self.pins[name], self.contents[name]
            self.freed.discard(name)

    @rule(blocks=st.integers(0, 3))
    def set_headroom(self, blocks: int) -> None:
        self.pool.decode_headroom_blocks = blocks

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_consistency()
        assert self.pool.num_free_blocks == TOTAL - len(self.held())
        for name, table in self.tables.items():
            assert self.pool.get_block_ids(name) == table

    @invariant()
    def stale_handles_are_refused(self) -> None:
        for handle in self.stale:
            with pytest.raises(StaleBlockError):
                self.pool.check_handles([handle])


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


# --- capacity and the prefix cache ----------------------------------------------------------------


def test_pinned_blocks_are_not_reused() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    pool.allocate_blocks("a", 2)
    pool.pin("a")
    pool.free("a")
    assert pool.num_free_blocks == 0
    assert pool.num_pending_blocks == 2
    assert pool.allocate_blocks("b", 1) is None
    pool.unpin("a")
    assert pool.allocate_blocks("b", 2) is not None


def test_prefill_leaves_the_decode_headroom() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    pool.decode_headroom_blocks = 2
    assert pool.allocate_blocks("prompt", 3, InstanceRole.PREFILL) is None
    assert pool.allocate_blocks("prompt", 2, InstanceRole.PREFILL) is not None
    assert pool.allocate_blocks("running", 2, InstanceRole.DECODE) is not None


def test_least_recently_used_prefix_is_evicted_first_and_tail_before_root() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    old, new = hashes_of([1] * 8), hashes_of([2] * 8)
    for name, hashes in (("old", old), ("new", new)):
        pool.allocate_blocks(name, 2)
        for index, block_hash in enumerate(hashes):
            pool.seal_block(name, index, block_hash)
        pool.free(name)
    pool.allocate_blocks("x", 1)
    assert pool.count_cached_prefix(old) == 1
    assert pool.count_cached_prefix(new) == 2


def test_a_block_hash_covers_the_whole_prefix() -> None:
    assert hashes_of([1, 2, 3, 4, 9, 9, 9, 9])[1] != hashes_of([1, 2, 3, 5, 9, 9, 9, 9])[1]
    assert hashes_of([1, 2, 3]) == []


def test_prefix_caching_can_be_off() -> None:
    pool = BlockPool(4, BLOCK_SIZE, enable_prefix_caching=False)
    pool.allocate_blocks("a", 1)
    pool.seal_block("a", 0, hashes_of([1] * 4)[0])
    pool.free("a")
    assert pool.count_cached_prefix(hashes_of([1] * 4)) == 0


def test_blocks_that_a_copy_holds_keep_their_contents_after_their_request() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    hashes = hashes_of([1] * 3 * BLOCK_SIZE)
    pool.allocate_blocks("request", 3)
    for index, block_hash in enumerate(hashes):
        pool.seal_block("request", index, block_hash)
    assert pool.hold("copy", hashes[1:]) == [1, 2]
    pool.free("request")
    assert pool.allocate_blocks("other", 3) is None
    assert pool.allocate_blocks("other", 2) == [3, 0]
    pool.check_consistency()
    pool.let_go("copy")
    assert pool.num_cached_blocks == 2
    pool.check_consistency()

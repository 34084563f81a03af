"""Copies of a rank between its arena and the host's memory, and what is noticed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from hbserve.config import KVCacheConfig
from hbserve.errors import StartupError
from hbserve.kv_cache.host_memory import HostMemoryOwner
from hbserve.kv_tiers.base import BlockName, SlotTier
from hbserve.kv_tiers.joint_results import JointTierResults
from hbserve.kv_tiers.rank_tiers import RankTiers
from hbserve.kv_transfer import block_parts
from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierResult
from hbserve.platform.cpu import CpuPlatform

NUM_BLOCKS, BLOCK_BYTES = 12, 512
DEADLINE_S = 20.0


@pytest.fixture
def host() -> Iterator[HostMemoryOwner]:
    owner = HostMemoryOwner(64 * BLOCK_BYTES)
    owner.reserve()
    yield owner
    owner.close()


class Rank:
    """A rank's tiers, with an arena of random bytes."""

    def __init__(
        self, host: HostMemoryOwner | None, rank: int = 0, num_ranks: int = 1, timeout_s: float = 30.0
    ) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.arena = torch.randint(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=generator)
        self.results: asyncio.Queue[TierResult] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(result: TierResult) -> None:
            loop.call_soon_threadsafe(self.results.put_nowait, result)

        config = KVCacheConfig(timeout_s=timeout_s)
        memory = None if host is None else host.memory
        self.tiers = RankTiers(
            config,
            memory,
            CpuPlatform(1),
            self.arena,
            rank,
            num_ranks,
            report,
        )

    async def store(self, slots: list[int], blocks: list[int], job_id: int = 1) -> TierResult:
        keys = [b"%d" % slot for slot in slots]
        self.tiers.handle(StoreBlocks(epoch=0, job_id=job_id, tier="host", keys=keys, slots=slots, block_ids=blocks))
        return await asyncio.wait_for(self.results.get(), DEADLINE_S)

    async def load(
        self, slots: list[int], blocks: list[int], checksums: list[list[int]], job_id: int = 2
    ) -> TierResult:
        keys = [b"%d" % slot for slot in slots]
        self.tiers.handle(
            LoadBlocks(
                epoch=0, job_id=job_id, tier="host", keys=keys, slots=slots, block_ids=blocks, checksums=checksums
            )
        )
        return await asyncio.wait_for(self.results.get(), DEADLINE_S)


async def test_what_is_stored_is_loaded(host: HostMemoryOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs and single slots, in several pieces of the buffer, and across the border of two pinned pieces."""
    monkeypatch.setattr("hbserve.kv_tiers.host._PIECE_BYTES", 4096)
    monkeypatch.setattr("hbserve.kv_tiers.lane._BUFFER_BYTES", 3 * BLOCK_BYTES)
    rank = Rank(host)
    slots = [5, 6, 7, 8, 9, 2, 0]
    before = rank.arena.clone()
    stored = await rank.store(slots, [3, 1, 0, 2, 4, 5, 9])
    assert (stored.failures, stored.error, stored.num_bytes) == ({}, None, 7 * BLOCK_BYTES)
    rank.arena.zero_()
    loaded = await rank.load(slots, [9, 8, 7, 6, 5, 4, 3], stored.checksums)
    assert (loaded.failures, loaded.error) == ({}, None)
    assert torch.equal(rank.arena[[9, 8, 7, 6, 5, 4, 3]], before[[3, 1, 0, 2, 4, 5, 9]])


async def test_every_flipped_byte_is_noticed(host: HostMemoryOwner) -> None:
    rank = Rank(host)
    stored = await rank.store([0, 1, 2], [0, 1, 2])
    memory = CpuPlatform(1).attach_shared_host(host.memory.handle, host.memory.num_bytes)
    for place in (0, 77, BLOCK_BYTES - 1):
        memory[BLOCK_BYTES + place] ^= 1
        loaded = await rank.load([0, 1, 2], [3, 4, 5], stored.checksums)
        assert (loaded.failures, loaded.error) == ({1: "checksum"}, "1 of 3 blocks: checksum")
        memory[BLOCK_BYTES + place] ^= 1
    assert not (await rank.load([0, 1, 2], [3, 4, 5], stored.checksums)).failures
    wrong_order = [stored.checksums[1], stored.checksums[0], stored.checksums[2]]
    assert (await rank.load([0, 1, 2], [3, 4, 5], wrong_order)).failures == {0: "checksum", 1: "checksum"}


async def test_ranks_have_regions_of_their_own_and_one_result(host: HostMemoryOwner) -> None:
    ranks = [Rank(host, rank, 2) for rank in range(2)]
    assert [rank.tiers.infos[0].num_slots for rank in ranks] == [32, 32]
    results: list[TierResult] = []
    joint = JointTierResults(2, results.append)
    for number, rank in enumerate(ranks):
        joint.add(number, await rank.store([31, 0], [1, 2]))
    [stored] = results
    assert stored.num_bytes == 4 * BLOCK_BYTES
    assert [len(numbers) for numbers in stored.checksums] == [2, 2]
    for rank in ranks:
        before = rank.arena[[1, 2]].clone()
        assert not (await rank.load([31, 0], [5, 6], stored.checksums)).failures
        assert torch.equal(rank.arena[[5, 6]], before)


class HangingTier(SlotTier):
    """A tier that waits."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.has_begun = threading.Event()

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        raise OSError("no space left")

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        self.has_begun.set()
        self.go_on.wait(DEADLINE_S)
        values.zero_()
        return {}


async def test_a_tier_that_hangs_fails_its_jobs_and_writes_nothing_afterwards() -> None:
    rank = Rank(None, timeout_s=0.05)
    slots = HangingTier()
    rank.tiers._open("host", slots, rank.arena, 0)
    before = rank.arena.clone()
    loaded = await rank.load([0, 1], [3, 4], [[1], [2]])
    assert (loaded.failures, loaded.error) == ({0: "timeout", 1: "timeout"}, "not done within 0.05 s")
    slots.go_on.set()
    stored = await rank.store([0], [1], job_id=3)  # another lane
    assert (stored.failures, stored.error) == ({0: "backend"}, "no space left")
    again = await rank.load([0], [3], [[0]], job_id=4)  # after the first one has returned: zeros are what it asks for
    assert not again.failures
    assert torch.equal(rank.arena[4], before[4])


async def test_the_end_of_an_epoch_ends_its_jobs() -> None:
    rank = Rank(None)
    slots = HangingTier()
    rank.tiers._open("host", slots, rank.arena, 0)
    before = rank.arena.clone()
    command = LoadBlocks(epoch=0, job_id=1, tier="host", keys=[b"0"], slots=[0], block_ids=[3], checksums=[[0]])
    rank.tiers.handle(command)
    await asyncio.to_thread(slots.has_begun.wait, DEADLINE_S)
    await rank.tiers.begin_epoch(5)
    rank.tiers.handle(command)  # of the epoch that has ended
    slots.go_on.set()
    rank.tiers.handle(
        LoadBlocks(epoch=5, job_id=2, tier="host", keys=[b"0"], slots=[0], block_ids=[6], checksums=[[0]])
    )
    result = await asyncio.wait_for(rank.results.get(), DEADLINE_S)
    assert (result.job_id, result.failures) == (2, {})
    assert torch.equal(rank.arena[3], before[3])
    assert not rank.arena[6].any()
    assert rank.results.empty()


def test_a_host_without_so_much_memory_says_so() -> None:
    owner = HostMemoryOwner(1 << 50)
    with pytest.raises(StartupError, match=r"kv_cache.host_bytes: .* \d+ bytes are available"):
        owner.reserve()
    owner.close()


def test_a_checksum_is_the_same_number_on_every_device() -> None:
    """CPUs multiply by numpy's sums of products, of one block or several; GPUs by elements."""
    found = torch.randint(0, 256, (5, BLOCK_BYTES), dtype=torch.uint8)
    weights = block_parts._weights(BLOCK_BYTES // 8, found.device)
    assert torch.equal(block_parts.checksums_of(found), (found.view(torch.int64) * weights).sum(1))
    assert [block_parts.checksum_of(row.view(torch.int64)) for row in found] == block_parts.checksums_of(found).tolist()

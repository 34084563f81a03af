"""KV tiers on a GPU: pinned memory, streams beside the steps, and the same tokens as without."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from hbserve.config import DiskTierConfig, KVCacheConfig, StoreTierConfig
from hbserve.kv_cache.host_memory import HostMemoryOwner
from hbserve.kv_tiers.rank_tiers import RankTiers
from hbserve.kv_transfer.block_parts import BlockParts, checksums_of, put_blocks, take_blocks
from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierResult
from hbserve.messages.transfer import LayerGroup
from hbserve.platform import make_platform
from tests.support.own_tiers import DictTier
from tests.support.store_process import running_store
from tests.system.test_kv_tiers import Case, check_answers, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Case]]:
    return make_model(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("mode", ["unified", "semi_pd"])
def test_answers_are_those_of_a_system_without_tiers(model: tuple[str, list[Case]], mode: str) -> None:
    check_answers(*model, mode=mode, device="cuda")


@pytest.mark.parametrize("num_words", [64, 4096, 9000])
def test_blocks_are_moved_and_summed_in_one_pass(num_words: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    arena = torch.randint(-(2**62), 2**62, (40, num_words), generator=generator)
    chosen = torch.tensor([7, 0, 39, 5, 21])
    sums = checksums_of(arena[chosen].view(torch.uint8).view(5, -1))
    on_gpu, index = arena.cuda(), chosen.cuda()
    out = torch.empty(5, num_words, dtype=torch.int64, device="cuda")
    assert torch.equal(take_blocks(on_gpu, index, out).cpu(), sums)
    assert torch.equal(out.cpu(), arena[chosen])
    assert torch.equal(put_blocks(on_gpu, index + 1 - index % 2, out).cpu(), sums)
    assert torch.equal(on_gpu[index + 1 - index % 2], out)
    parts = BlockParts(arena.cuda().view(torch.uint8).view(40, -1))
    assert parts.checksums(chosen.tolist()) == sums.tolist()
    layers = BlockParts(arena.view(torch.uint8).view(40, -1)).of_layers(LayerGroup(index=1, count=2))
    assert parts.of_layers(LayerGroup(index=1, count=2)).checksums([3, 8]) == layers.checksums([3, 8])


@pytest.mark.parametrize("tier", ["host", "disk"])
async def test_both_directions_at_once_lose_nothing(tier: str, tmp_path: Path) -> None:
    """A lane's buffers, in many pieces, with blocks of a whole model's size."""
    platform = make_platform("cuda", 0, None, 1, 0, 1)
    platform.activate()
    block_bytes, count = 1 << 20, 96
    owner = HostMemoryOwner(count * block_bytes + 4096)
    owner.reserve()
    generator = torch.Generator().manual_seed(1)
    arena = torch.randint(0, 256, (2 * count, block_bytes), dtype=torch.uint8, generator=generator).cuda()
    before = arena[:count].clone()
    results: asyncio.Queue[TierResult] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def report(result: TierResult) -> None:
        loop.call_soon_threadsafe(results.put_nowait, result)

    disk = DiskTierConfig(path=str(tmp_path), bytes=2 * count * block_bytes) if tier == "disk" else None
    memory = owner.memory if tier == "host" else None
    tiers = RankTiers(KVCacheConfig(disk=disk), memory, platform, arena, 0, 1, report)
    slots, keys = list(reversed(range(count))), [b"%016d" % slot for slot in range(count)]
    blocks, others = torch.randperm(count).tolist(), (count + torch.randperm(count)).tolist()
    checksums: list[list[int]] = []
    for job_id in range(1, 5):
        tiers.handle(StoreBlocks(epoch=0, job_id=job_id, tier=tier, keys=keys, slots=slots, block_ids=blocks))
        if checksums:
            command = LoadBlocks(
                epoch=0,
                job_id=100 + job_id,
                tier=tier,
                keys=keys,
                slots=slots,
                block_ids=others,
                checksums=checksums,
            )
            tiers.handle(command)
        for _ in range(2 if checksums else 1):
            result = await asyncio.wait_for(results.get(), 30.0)
            assert (result.failures, result.error) == ({}, None)
            checksums = result.checksums or checksums
    assert torch.equal(arena[others], before[blocks])
    owner.close()


async def test_a_lane_takes_no_memory_that_the_kernels_of_a_step_still_use() -> None:
    """What a step frees goes to the next one of its stream, and a lane has other streams."""
    platform = make_platform("cuda", 0, None, 1, 0, 1)
    platform.activate()
    block_bytes, count = 1 << 20, 16
    owner = HostMemoryOwner(count * block_bytes + 4096)
    owner.reserve()
    arena = torch.zeros(count, block_bytes, dtype=torch.uint8, device="cuda")
    ended: asyncio.Queue[TierResult] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def report(result: TierResult) -> None:
        loop.call_soon_threadsafe(ended.put_nowait, result)

    tiers = RankTiers(KVCacheConfig(), owner.memory, platform, arena, 0, 1, report)
    freed = [torch.full((count * block_bytes,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    copies = [torch.empty_like(tensor) for tensor in freed]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of other kernels
    for tensor, copy in zip(freed, copies, strict=True):
        copy.copy_(tensor)
    del tensor, freed
    places = list(range(count))
    tiers.handle(
        StoreBlocks(epoch=0, job_id=1, tier="host", keys=[b"%016d" % n for n in places], slots=places, block_ids=places)
    )
    assert not (await asyncio.wait_for(ended.get(), 30.0)).failures
    assert all((copy == 7).all() for copy in copies)
    owner.close()


def test_answers_are_the_same_with_a_store(model: tuple[str, list[Case]], tmp_path: Path) -> None:
    pytest.importorskip("mooncake.store")
    folder, cases = model
    with running_store(tmp_path) as store:
        settings: dict[str, Any] = {"mode": "unified", "device": "cuda", "store": store.settings}
        check_answers(folder, cases, **settings, expects_stored=False)
        check_answers(folder, cases, **settings)


async def test_blocks_of_a_gpu_pass_through_the_hosts_memory_to_a_tier_by_name() -> None:
    platform = make_platform("cuda", 0, None, 1, 0, 1)
    platform.activate()
    arena = torch.randint(0, 256, (400, 147456), dtype=torch.uint8, device="cuda")
    results: asyncio.Queue[TierResult] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def report(result: TierResult) -> None:
        loop.call_soon_threadsafe(results.put_nowait, result)

    config = KVCacheConfig(store=StoreTierConfig(bytes=1 << 30, backend="tests.support.own_tiers:DictTier"))
    tiers = RankTiers(config, None, platform, arena, 0, 1, report)
    keys = [number.to_bytes(16, "big") for number in range(200)]
    places = list(range(200))
    tiers.handle(StoreBlocks(epoch=0, job_id=1, tier="store", keys=keys, slots=places, block_ids=places))
    stored = await asyncio.wait_for(results.get(), 60.0)
    assert not stored.failures
    DictTier.kept[min(DictTier.kept)][5000] ^= 1
    unchecked: list[list[int]] = [[] for _ in keys]
    for checksums in (stored.checksums, unchecked):
        arena[200:].zero_()
        tiers.handle(
            LoadBlocks(
                epoch=0,
                job_id=2,
                tier="store",
                keys=keys,
                slots=places,
                block_ids=list(range(200, 400)),
                checksums=checksums,
            )
        )
        loaded = await asyncio.wait_for(results.get(), 60.0)
        # The wrong value was removed. A load ends at the call that misses a block.
        assert loaded.failures.pop(0) == ("checksum" if checksums is stored.checksums else "missing")
        assert set(loaded.failures.values()) <= {"missing"}
        right = [place for place in places[1:] if place not in loaded.failures]
        assert right[:50] == places[1:51]
        assert torch.equal(arena[200:][right], arena[right])

"""A tier of a user's own behind a rank's lanes: a right one, the one of docs/kv_tiers.md, and wrong ones."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from msgspec.structs import replace

from hbserve.config import DiskTierConfig, KVCacheConfig, StoreTierConfig
from hbserve.errors import ConfigError, HBServeError, StartupError
from hbserve.kv_tiers.base import BlockName, KVTier
from hbserve.kv_tiers.rank_tiers import RankTiers
from hbserve.kv_tiers.sealed import SEAL_BYTES
from hbserve.messages.tiers import FindBlocks, FoundBlocks, LoadBlocks, StoreBlocks, TierResult
from hbserve.platform.cpu import CpuPlatform
from tests.support.own_tiers import DictTier
from tests.support.paths import ROOT

NUM_BLOCKS, BLOCK_BYTES = 12, 512
DEADLINE_S = 20.0
OWN = "tests.support.own_tiers:DictTier"
KEYS = [bytes([number]) * 16 for number in range(6)]


@pytest.fixture(autouse=True)
def empty() -> None:
    DictTier.kept.clear()
    DictTier.removed.clear()


class Rank:
    """One rank, whose store is a user's class."""

    def __init__(
        self, backend: str = OWN, rank: int = 0, num_ranks: int = 1, name: str = "m", timeout_s: float = 30.0
    ) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.arena = torch.randint(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=generator)
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(answer: TierResult | FoundBlocks) -> None:
            loop.call_soon_threadsafe(self.answers.put_nowait, answer)

        config = KVCacheConfig(store=StoreTierConfig(bytes=1 << 16, backend=backend), timeout_s=timeout_s)
        self.tiers = RankTiers(config, None, CpuPlatform(1), self.arena, rank, num_ranks, report, name, report)

    async def answer(self) -> Any:
        return await asyncio.wait_for(self.answers.get(), DEADLINE_S)

    async def store(self, keys: list[bytes], blocks: list[int]) -> TierResult:
        places = list(range(len(keys)))
        self.tiers.handle(StoreBlocks(epoch=0, job_id=1, tier="store", keys=keys, slots=places, block_ids=blocks))
        result: TierResult = await self.answer()
        return result

    async def load(self, keys: list[bytes], blocks: list[int], known: list[list[int]] | None = None) -> TierResult:
        checksums = known or [[] for _ in keys]
        self.tiers.handle(
            LoadBlocks(
                epoch=0,
                job_id=2,
                tier="store",
                keys=keys,
                slots=[0] * len(keys),
                block_ids=blocks,
                checksums=checksums,
            )
        )
        result: TierResult = await self.answer()
        return result

    async def find(self, keys: list[bytes]) -> FoundBlocks:
        self.tiers.find(FindBlocks(epoch=0, lookup_id=5, tier="store", keys=keys))
        found: FoundBlocks = await self.answer()
        return found


async def test_what_one_system_stores_another_one_finds_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.kv_tiers.lane._BUFFER_BYTES", 3 * BLOCK_BYTES)
    one, other = Rank(), Rank()
    [info] = one.tiers.infos
    assert (info.name, info.by_name, info.num_slots) == ("store", True, (1 << 16) // (BLOCK_BYTES + SEAL_BYTES))
    assert (await one.find(KEYS)).num_found == 0
    stored = await one.store(KEYS[:5], [4, 3, 2, 1, 0])
    assert (stored.failures, stored.error, stored.num_bytes) == ({}, None, 5 * BLOCK_BYTES)
    found = await other.find(KEYS)
    assert (found.lookup_id, found.num_found, found.error) == (5, 5, None)
    other.arena.zero_()
    assert (await other.load(KEYS[:5], [7, 8, 9, 10, 11])).failures == {}
    assert torch.equal(other.arena[7:], one.arena[[4, 3, 2, 1, 0]])
    assert (await one.load(KEYS[:5], [7, 8, 9, 10, 11], stored.checksums)).failures == {}


async def test_a_block_is_found_when_all_ranks_have_stored_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.kv_tiers.lookups._MAX_NAMES", 3)  # one block at a time
    ranks = [Rank(rank=number, num_ranks=2) for number in range(2)]
    await ranks[0].store(KEYS[:3], [0, 1, 2])
    await ranks[1].store(KEYS[:2], [0, 1])
    assert (await ranks[0].find(KEYS)).num_found == 2
    assert len({name.rpartition("-")[0] for name in DictTier.kept}) == 2


async def test_another_model_finds_nothing() -> None:
    await Rank(name="m").store(KEYS, [0, 1, 2, 3, 4, 5])
    assert (await Rank(name="n").find(KEYS)).num_found == 0


async def test_every_wrong_value_is_noticed_and_removed() -> None:
    rank = Rank()
    stored = await rank.store(KEYS, [0, 1, 2, 3, 4, 5])
    texts = sorted(DictTier.kept)
    DictTier.kept[texts[0]][77] ^= 1  # a byte of the block
    DictTier.kept[texts[1]][-1] ^= 1  # of its checksum
    DictTier.kept[texts[2]][-20] ^= 1  # of the digest of its name
    DictTier.kept[texts[3]] = DictTier.kept[texts[4]]  # another block
    del DictTier.kept[texts[5]]  # evicted
    for known in (None, stored.checksums):
        values = dict(DictTier.kept)
        result = await rank.load(KEYS, [6, 7, 8, 9, 10, 11], known)
        assert result.failures == {0: "checksum", 1: "checksum", 2: "checksum", 3: "checksum", 5: "missing"}
        assert DictTier.removed == texts[:4]
        DictTier.removed.clear()
        DictTier.kept.update(values)


async def test_a_load_ends_at_the_call_that_finds_a_block_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.kv_tiers.named_lane._HALF_BYTES", 2 * (BLOCK_BYTES + SEAL_BYTES))
    rank = Rank()
    await rank.store(KEYS, [0, 1, 2, 3, 4, 5])
    [lost] = [text for text in DictTier.kept if text.endswith(KEYS[3].hex())]
    del DictTier.kept[lost]
    DictTier.num_gets = 0
    result = await rank.load(KEYS, [6, 7, 8, 9, 10, 11])
    assert result.failures == dict.fromkeys((3, 4, 5), "missing")
    assert result.error == "3 of 6 blocks: missing"
    assert DictTier.num_gets == 2  # of four: 2, 2, 1, 1 blocks
    assert torch.equal(rank.arena[[6, 7, 8]], rank.arena[[0, 1, 2]])
    assert not (await rank.load(KEYS[4:], [10, 11])).failures


async def test_a_right_value_that_is_not_what_this_system_stored_is_not_taken() -> None:
    rank = Rank()
    await rank.store(KEYS[:1], [0])
    assert (await rank.load(KEYS[:1], [6], [[123]])).failures == {0: "checksum"}


class _Raises(DictTier):
    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        raise LookupError("no such shelf")

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        raise SystemError

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        raise ArithmeticError("cannot count")


class _Misunderstands(DictTier):
    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        return None  # type: ignore[return-value]

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        return {99: "missing"}

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        return [True]


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("_Raises", ("no such shelf", "SystemError()", "cannot count")),
        ("_Misunderstands", ("got None", "got {99: 'missing'}", "for each of 6 names, got 1")),
    ],
)
async def test_what_a_tier_raises_or_misunderstands_is_told(name: str, errors: tuple[str, str, str]) -> None:
    rank = Rank(f"{__name__}:{name}")
    results = await rank.store(KEYS[:2], [0, 1]), await rank.load(KEYS[:2], [3, 4])
    for result, error in zip(results, errors, strict=False):
        assert result.failures == {0: "backend", 1: "backend"}
        assert result.error is not None
        assert error in result.error
    found = await rank.find(KEYS)
    assert found.error is not None
    assert errors[2] in found.error


class _Hangs(DictTier):
    go_on = threading.Event()

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        self.go_on.wait(DEADLINE_S)
        return super().get(names, values)


async def test_a_tier_that_hangs_is_given_up_and_writes_nothing_afterwards() -> None:
    rank = Rank(f"{__name__}:_Hangs", timeout_s=0.3)
    await Rank().store(KEYS[:2], [0, 1])
    before = rank.arena.clone()
    assert (await rank.load(KEYS[:2], [3, 4])).failures == {0: "timeout", 1: "timeout"}
    _Hangs.go_on.set()
    again = await rank.load(KEYS[:2], [5, 6])  # after the first one has returned
    assert set(again.failures.values()) <= {"timeout"}  # of a busy machine
    assert torch.equal(rank.arena[[3, 4]], before[[3, 4]])


class _Gathers(DictTier):
    """Puts blocks from where they lie; ``go_on``: not before it is set."""

    gathers = True
    go_on, has_put = threading.Event(), threading.Event()

    def put_gathered(
        self, names: Sequence[BlockName], blocks: Sequence[torch.Tensor], seals: torch.Tensor
    ) -> dict[int, str]:
        self.go_on.wait(DEADLINE_S)
        places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in self.registered]
        for part in (*blocks, seals):
            assert any(begin <= part.data_ptr() <= end - part.nbytes for begin, end in places), "it is not registered"
        failures = self.put(names, torch.cat([torch.stack(list(blocks)), seals], dim=1))
        self.has_put.set()
        return failures


async def test_a_tier_that_gathers_keeps_what_others_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.kv_tiers.named_lane._HALF_BYTES", 2 * (BLOCK_BYTES + SEAL_BYTES))
    _Gathers.go_on.set()
    copied = await Rank().store(KEYS[:5], [4, 2, 3, 0, 1])
    values = dict(DictTier.kept)
    DictTier.kept.clear()
    rank = Rank(f"{__name__}:_Gathers")
    assert await rank.store(KEYS[:5], [4, 2, 3, 0, 1]) == replace(copied, seconds=ANY)
    assert DictTier.kept == values
    assert not (await rank.load(KEYS[:5], [7, 8, 9, 10, 11])).failures


async def test_blocks_that_others_write_while_they_are_gathered_are_not_taken_later() -> None:
    _Gathers.go_on.clear()
    _Gathers.has_put.clear()
    rank = Rank(f"{__name__}:_Gathers", timeout_s=0.1)
    assert (await rank.store(KEYS[:2], [0, 1])).failures == {0: "timeout", 1: "timeout"}
    rank.arena[1] = 7  # the scheduler has given it to another request
    _Gathers.go_on.set()
    assert await asyncio.to_thread(_Gathers.has_put.wait, DEADLINE_S)
    assert (await Rank().load(KEYS[:2], [3, 4])).failures == {1: "checksum"}


async def test_the_tier_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kv_tiers.md").read_text(), re.DOTALL)
    (tmp_path / "folder_tier_of_docs.py").write_text(code.replace("/mnt/shared/kv", str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    rank = Rank("folder_tier_of_docs:FolderTier")
    await rank.store(KEYS[:3], [0, 1, 2])
    assert (await Rank("folder_tier_of_docs:FolderTier").find(KEYS)).num_found == 3
    path = tmp_path / f"m-0of1-{KEYS[1].hex()}"
    path.write_bytes(path.read_bytes()[:-9])
    result = await rank.load(KEYS[:4], [4, 5, 6, 7])
    assert result.failures == {1: "checksum", 3: "missing"}
    assert torch.equal(rank.arena[[4, 6]], rank.arena[[0, 2]])
    assert not path.exists()


class _CannotStart(KVTier):
    def __init__(self, context: object) -> None:
        raise OSError("no shelf at all")

    put = get = contains = remove = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        ("no.such:Tier", ConfigError, r"kv_cache.store.backend: cannot import 'no.such:Tier'"),
        ("pathlib:Path", ConfigError, r"not a subclass of hbserve.kv_tiers.base.KVTier"),
        (f"{__name__}:_CannotStart", StartupError, r"_CannotStart: OSError: no shelf at all"),
    ],
)
async def test_a_class_that_cannot_be_used_is_refused(backend: str, error: type[HBServeError], text: str) -> None:
    with pytest.raises(error, match=text):
        Rank(backend)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            KVCacheConfig(store=StoreTierConfig(bytes=500, backend=OWN)),
            "store.bytes: a block has 544 bytes",
        ),
        (KVCacheConfig(disk=DiskTierConfig(path="", bytes=500)), "disk.bytes: a block has 512 bytes"),
    ],
)
def test_a_tier_that_holds_no_block_is_refused(config: KVCacheConfig, text: str, tmp_path: Path) -> None:
    if config.disk is not None:
        config = replace(config, disk=replace(config.disk, path=str(tmp_path)))
    arena = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    with pytest.raises(StartupError, match=text):
        RankTiers(config, None, CpuPlatform(1), arena, 0, 1, lambda result: None)

"""The disk tier: what a file holds after a restart, and what is noticed."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch

from hbserve.config import DiskTierConfig
from hbserve.kv_tiers.base import BlockName, namespace
from hbserve.kv_tiers.disk import DiskTier, DiskTierError
from hbserve.kv_transfer.block_parts import checksums_of

BLOCK_BYTES = 640
NAME = namespace("model", "float32")


def open_slots(folder: Path, rank: int = 0, num_ranks: int = 1, name: str = NAME, num_bytes: int = 100_000) -> DiskTier:
    return DiskTier(DiskTierConfig(path=str(folder), bytes=num_bytes), name, rank, num_ranks, BLOCK_BYTES)


def blocks(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, BLOCK_BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def store(slots: DiskTier, numbers: list[int], contents: torch.Tensor) -> list[int]:
    checksums = checksums_of(contents)
    names = [
        BlockName("", b"%016d" % number, number, checksum)
        for number, checksum in zip(numbers, checksums.tolist(), strict=True)
    ]
    assert slots.put(names, contents) == {}
    found: list[int] = checksums.tolist()
    return found


def load(slots: DiskTier, numbers: list[int]) -> tuple[torch.Tensor, dict[int, str]]:
    found = torch.zeros(len(numbers), BLOCK_BYTES, dtype=torch.uint8)
    failures = slots.get([BlockName("", slot=number) for number in numbers], found)
    return found, failures


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    contents = blocks(3)
    slots = open_slots(tmp_path)
    assert slots.num_slots > 10
    assert slots.kept() == []
    checksums = store(slots, [4, 0, 7], contents)
    slots = open_slots(tmp_path)
    kept = slots.kept()
    assert [(block.key, block.slot, block.checksums) for block in kept] == [
        (b"%016d" % number, number, [checksum]) for number, checksum in zip([4, 0, 7], checksums, strict=True)
    ]
    found, failures = load(slots, [4, 0, 7])
    assert not failures
    assert torch.equal(found, contents)


def test_what_a_file_does_not_hold_whole_is_not_kept(tmp_path: Path) -> None:
    """A damaged header, a block that was being written, and a file of another model."""
    slots = open_slots(tmp_path)
    store(slots, [0, 1, 2], blocks(3))
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[64 + 5] ^= 1
    data[128:192] = bytes(64)
    path.write_bytes(data)
    assert [block.slot for block in open_slots(tmp_path).kept()] == [0]
    assert open_slots(tmp_path, name=namespace("model", "bfloat16")).kept() == []


def test_a_restart_with_other_limits_keeps_what_fits(tmp_path: Path) -> None:
    numbers = [0, 3, 63, 64, 100]  # of two groups
    contents = blocks(len(numbers))
    large = open_slots(tmp_path, num_bytes=1_000_000)
    store(large, numbers, contents)
    [file] = tmp_path.iterdir()
    size = file.stat().st_size
    assert 900_000 < size <= 1_000_000
    assert open_slots(tmp_path, num_bytes=2_000_000).kept() == large.kept()
    for num_bytes, count in ((1_000_000, 5), (300_000, 4), (100_000, 2), (1_000_000, 2)):
        slots = open_slots(tmp_path, num_bytes=num_bytes)
        assert num_bytes - 8192 < file.stat().st_size <= num_bytes
        assert [block.slot for block in slots.kept()] == numbers[:count]
        found, failures = load(slots, numbers[:count])
        assert not failures
        assert torch.equal(found, contents[:count])


def test_a_file_system_that_reserves_nothing_gives_no_more_than_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _NoFallocate:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr("hbserve.kv_tiers.disk._libc", _NoFallocate)
    slots = open_slots(tmp_path)
    [file] = tmp_path.iterdir()
    assert file.stat().st_size > 90_000
    assert file.stat().st_blocks < 10  # nothing was written
    store(slots, [3], blocks(1))
    assert [block.slot for block in open_slots(tmp_path).kept()] == [3]
    with pytest.raises(DiskTierError, match="No space left on device"):
        open_slots(tmp_path, num_bytes=1 << 50)
    assert file.stat().st_size < 100_000


def test_ranks_keep_only_what_all_of_them_have(tmp_path: Path) -> None:
    ranks = [open_slots(tmp_path, rank, 2) for rank in range(2)]
    store(ranks[0], [0, 1, 2], blocks(3))
    assert ranks[0].kept() == []
    store(ranks[1], [1, 3], blocks(2))
    [block] = ranks[0].kept()
    assert (block.slot, len(block.checksums)) == (1, 2)


def test_a_short_file_is_noticed(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    store(slots, [0, 9], blocks(2))
    [path] = tmp_path.iterdir()
    with path.open("r+b") as file:
        file.truncate(4096 + 5 * 4096)
    _, failures = load(slots, [0, 9])
    assert failures == {1: "missing"}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskTierError, match=r"kv_cache.disk: .*file/.*kv: Not a directory|File exists"):
        open_slots(tmp_path / "file")
    config = DiskTierConfig(path=str(tmp_path / "big"), bytes=1 << 62)
    with pytest.raises(DiskTierError, match=r"kv_cache.disk: .*\.kv: "):
        DiskTier(config, NAME, 0, 1, BLOCK_BYTES)
    assert [path.stat().st_size for path in (tmp_path / "big").iterdir()] == [0]


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder"])
def test_what_others_may_have_put_in_the_files_place_is_refused(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / f"{NAME}-0of1.kv", tmp_path / "precious"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
    if kind == "link":
        target.write_text("precious")
    with pytest.raises(DiskTierError, match=f"kv_cache.disk: {path}: "):
        open_slots(tmp_path)
    assert (target.read_text() if target.exists() else None) == ("precious" if kind == "link" else None)

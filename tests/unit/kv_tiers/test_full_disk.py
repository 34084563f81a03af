"""The disk tier on a disk that is full: a small tmpfs in a mount namespace of a process of its own."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hbserve.config import DiskTierConfig
from hbserve.kv_tiers.base import BlockName
from hbserve.kv_tiers.disk import DiskTier, DiskTierError

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_PUNCH_HOLE, _KEEP_SIZE = 0x2, 0x1
_NO_NAMESPACES = 77
BLOCK_BYTES, NUM_BYTES = 4096, 512 << 10
_libc = ctypes.CDLL(None, use_errno=True)


def _mounts(folder: Path, uid: int, gid: int) -> bool:
    """Enter a user and a mount namespace, in which this user is root, and mount a tmpfs."""
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return not _libc.mount(b"none", bytes(folder), b"tmpfs", 0, b"size=1m")


def on_small_disk(folder: Path, work: Callable[[Path], None]) -> None:
    """Run work in a child process, for which ``folder`` is a file system of its own with room for 1 MiB."""
    uid, gid = os.getuid(), os.getgid()
    pid = os.fork()
    if pid == 0:  # has one thread, as a new user namespace demands
        code = 1
        try:
            code = _NO_NAMESPACES if not _mounts(folder, uid, gid) else 1
            if code == 1:
                work(folder)
                code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) == _NO_NAMESPACES:
        pytest.skip("this machine gives processes no mount namespace of their own")
    assert os.waitstatus_to_exitcode(status) == 0


def fill(folder: Path) -> None:
    with (folder / "others").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_there_is_no_tier_on_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        with pytest.raises(DiskTierError, match=r"kv_cache.disk: .*kv: No space left on device"):
            DiskTier(DiskTierConfig(path=str(folder), bytes=4 << 20), "m", 0, 1, BLOCK_BYTES)
        assert [path.stat().st_size for path in folder.iterdir()] == [0]  # what was taken is given back

    on_small_disk(tmp_path, work)


def test_a_disk_that_becomes_full_fails_the_writes_and_keeps_the_rest(tmp_path: Path) -> None:
    """As on a file system that copies on write: the file's own room is gone, although it was reserved."""

    def work(folder: Path) -> None:
        tier = DiskTier(DiskTierConfig(path=str(folder), bytes=NUM_BYTES), "m", 0, 1, BLOCK_BYTES)
        blocks = torch.arange(2 * BLOCK_BYTES, dtype=torch.uint8).view(2, BLOCK_BYTES)
        names = [BlockName("", bytes([slot]) * 16, slot, slot) for slot in (3, 90)]
        assert tier.put(names[:1], blocks[:1]) == {}
        [file] = folder.iterdir()
        begin = file.stat().st_size // 2 // 4096 * 4096
        descriptor = os.open(file, os.O_RDWR)
        size = ctypes.c_long(file.stat().st_size - begin)
        assert not _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(begin), size)
        fill(folder)
        assert tier.put(names[1:], blocks[1:]) == {0: "backend"}
        found = torch.zeros_like(blocks)
        assert tier.get(names[:1], found) == {}
        assert torch.equal(found[0], blocks[0])
        assert [block.slot for block in tier.kept()] == [3]

    on_small_disk(tmp_path, work)

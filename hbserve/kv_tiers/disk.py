"""The disk tier: slots in a file of fixed size for each rank, which survive a restart.

A file is a row of groups: a page with the headers of 64 slots, 64 bytes each, and then the blocks of these slots, each
from the border of a page on. So a slot lies at the same place whatever the size of the file, and a restart with another
``kv_cache.disk.bytes`` finds the slots that still fit. The header says which contents the slot holds, with their
checksum. It is cleared before the block is written, and written after it. So a slot whose header is whole holds its
block, or a load finds a wrong checksum. Nothing is synchronized to the medium: after a loss of power, headers and
blocks may disagree, which the checksums show.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from hbserve.config import DiskTierConfig
from hbserve.errors import HBServeError
from hbserve.kv_tiers.base import BlockName, SlotTier
from hbserve.messages.tiers import StoredBlock

_PAGE_BYTES = 4096
_HEADER_BYTES = 64
_GROUP_SLOTS = _PAGE_BYTES // _HEADER_BYTES
_HEADER = struct.Struct("<16sqQ")  # key, checksum, time of the store in ns; then the CRC of these


class DiskTierError(HBServeError):
    """The disk tier cannot be used here."""


def _open(path: Path, flags: int) -> int:
    """Open a file of this user's; return its descriptor.

    The name can be guessed, and others may write in the folder: a link would lead the tier to any file of this user's,
    and a file of another user's would show them the blocks.

    Raises:
        OSError: also if it is a link, no file, or another user's.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    kind = os.fstat(file)
    if not stat.S_ISREG(kind.st_mode) or kind.st_uid != os.geteuid():
        os.close(file)
        raise OSError(errno.EPERM, "it is not a file of this user's; remove it, or choose another kv_cache.disk.path")
    return file


def _allocate(file: int, num_bytes: int) -> None:
    """Take room on the disk for a file of this size; where the file system cannot, compare with what is free.

    Not by `os.posix_fallocate`, which then writes to every page of the file.

    Raises:
        OSError: if there is too little room.
    """
    if not _libc.fallocate(file, 0, ctypes.c_long(0), ctypes.c_long(num_bytes)):
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    disk = os.fstatvfs(file)
    if num_bytes - 512 * os.fstat(file).st_blocks > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_libc = ctypes.CDLL(None, use_errno=True)


class DiskTier(SlotTier):
    """One rank's file. All instances of a host with the same `name` share it; the scheduler gives out its slots.

    Args:
        name: see `hbserve.kv_tiers.base.namespace`.
        block_bytes: of one rank's part of a block.

    Attributes:
        memory: identifies the files of all ranks together.

    Raises:
        DiskTierError: if the file cannot be made, or the disk has too little room.
    """

    def __init__(self, config: DiskTierConfig, name: str, rank: int, num_ranks: int, block_bytes: int) -> None:
        self._folder, self._name, self._num_ranks = Path(config.path), name, num_ranks
        self._block_bytes = block_bytes
        self._of_thread = threading.local()
        self._stride = block_bytes + -block_bytes % _PAGE_BYTES
        self._group_bytes = _PAGE_BYTES + _GROUP_SLOTS * self._stride
        num_groups, rest = divmod(config.bytes // num_ranks, self._group_bytes)
        self.num_slots = num_groups * _GROUP_SLOTS + max(0, rest - _PAGE_BYTES) // self._stride
        self.memory = f"{socket.gethostname()}:{self._folder.resolve()}/{name}"
        path = self._path(rank)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = _open(path, os.O_RDWR | os.O_CREAT)
            self._reserve(max(_PAGE_BYTES, self._block_at(self.num_slots - 1) + self._stride))
        except OSError as error:
            what = "it is a link; remove it" if error.errno == errno.ELOOP else error.strerror
            raise DiskTierError(f"kv_cache.disk: {path}: {what}") from None

    def _header_at(self, slot: int) -> int:
        group, number = divmod(slot, _GROUP_SLOTS)
        return group * self._group_bytes + number * _HEADER_BYTES

    def _block_at(self, slot: int) -> int:
        group, number = divmod(slot, _GROUP_SLOTS)
        return group * self._group_bytes + _PAGE_BYTES + number * self._stride

    def _reserve(self, num_bytes: int) -> None:
        """Give the file its size, and take the room on the disk."""
        before = os.fstat(self._file).st_size
        try:
            _allocate(self._file, num_bytes)
            os.ftruncate(self._file, num_bytes)  # it may have been larger
            beyond = -self.num_slots % _GROUP_SLOTS  # headers of the last group whose blocks are gone
            os.pwrite(self._file, bytes(beyond * _HEADER_BYTES), self._header_at(self.num_slots))
        except OSError:
            os.ftruncate(self._file, before)  # what was allocated before the disk was full
            os.close(self._file)
            raise

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._name}-{rank}of{self._num_ranks}.kv"

    # --- the lanes' threads ----------------------------------------------------------------------

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        buffer = self._in_host(values)
        if buffer is not values:
            buffer.copy_(values)
        array = buffer.numpy()
        failures: dict[int, str] = {}
        for index, name in enumerate(names):
            header = _HEADER.pack(name.key, name.checksum, time.time_ns())
            header += zlib.crc32(header).to_bytes(4, "little")
            try:
                os.pwrite(self._file, bytes(_HEADER_BYTES), self._header_at(name.slot))
                written = os.pwrite(self._file, array[index].data, self._block_at(name.slot))
                if written != self._block_bytes:
                    failures[index] = "backend"
                    continue
                os.pwrite(self._file, header, self._header_at(name.slot))
            except OSError:
                failures[index] = "backend"
        return failures

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        buffer = self._in_host(values)
        array = buffer.numpy()
        failures: dict[int, str] = {}
        for index, name in enumerate(names):
            try:
                if os.preadv(self._file, [array[index].data], self._block_at(name.slot)) != self._block_bytes:
                    failures[index] = "missing"
            except OSError:
                failures[index] = "backend"
        if buffer is not values:
            values.copy_(buffer)
        return failures

    def _in_host(self, values: torch.Tensor) -> torch.Tensor:
        """Return values that the host can read, or on a GPU pinned memory for them, which each lane has of its own."""
        if values.device.type == "cpu":
            return values
        pinned: torch.Tensor | None = getattr(self._of_thread, "pinned", None)
        if pinned is None or len(pinned) < len(values):
            pinned = self._of_thread.pinned = torch.empty(values.shape, dtype=torch.uint8, pin_memory=True)
        return pinned[: len(values)]

    # --- any thread ------------------------------------------------------------------------------

    def kept(self) -> list[StoredBlock]:
        """Read which blocks the files of all ranks hold, the one that was stored first at the beginning."""
        by_rank = [self._headers(rank) for rank in range(self._num_ranks)]
        found: list[tuple[int, StoredBlock]] = []
        for slot, (key, _, stored_at) in by_rank[0].items():
            parts = [headers[slot] for headers in by_rank if slot in headers]
            if len(parts) == self._num_ranks and all(part[0] == key for part in parts):
                found.append((stored_at, StoredBlock(key=key, slot=slot, checksums=[part[1] for part in parts])))
        return [block for _, block in sorted(found, key=lambda item: item[0])]

    def _headers(self, rank: int) -> dict[int, tuple[bytes, int, int]]:
        """Read the whole headers of a rank's file, by slot: key, checksum, time; empty if there is no file."""
        headers: dict[int, tuple[bytes, int, int]] = {}
        with contextlib.suppress(OSError), open(_open(self._path(rank), os.O_RDONLY), "rb") as file:
            table = b""
            for slot in range(self.num_slots):
                begin = slot % _GROUP_SLOTS * _HEADER_BYTES
                if not begin:
                    table = os.pread(file.fileno(), _PAGE_BYTES, self._header_at(slot))
                header = table[begin : begin + _HEADER.size + 4]
                body, crc = header[: _HEADER.size], header[_HEADER.size :]
                if any(body) and zlib.crc32(body).to_bytes(4, "little") == crc:
                    key, checksum, stored_at = _HEADER.unpack(body)
                    headers[slot] = key, checksum, stored_at
        return headers

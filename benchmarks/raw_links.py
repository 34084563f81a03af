"""The libraries under KV transfer by themselves, between two processes of one host."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hbserve.errors import ConfigError, KVTransferError
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.platform.remote_arena import RemoteArena

dist: Any = torch.distributed
_TIMEOUT = timedelta(seconds=60)


class RawLink(ABC):
    """One end of a link. The sender calls `send` and the receiver `receive`, for the same pieces.

    Args:
        arena: the buffer.
    """

    def __init__(self, arena: torch.Tensor) -> None:
        self._buffer = arena.view(-1)

    @abstractmethod
    def listen(self) -> str:
        """Return the receiver's address."""

    @abstractmethod
    def send(self, endpoint: str, num_bytes: int, count: int) -> float:
        """Move ``count`` pieces of ``num_bytes``, one after the other; return the seconds."""

    def receive(self, endpoint: str, num_bytes: int, count: int) -> None:
        """Receive the pieces, where the library needs the receiver to take part."""
        return

    def _synchronize(self) -> None:
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)


class MooncakeLink(RawLink):
    """`transfer_sync_write`, as Mooncake's own benchmark calls it."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__(arena)
        self._engine: Any = None

    def _start(self) -> Any:
        if self._engine is None:
            # The measured backend has prepared the environment.
            self._engine = importlib.import_module("mooncake.engine").TransferEngine()
            if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
                raise KVTransferError("no Mooncake engine")
            self._engine.register_memory(self._buffer.data_ptr(), self._buffer.nbytes)
        return self._engine

    def listen(self) -> str:
        return f"127.0.0.1:{self._start().get_rpc_port()} {self._buffer.data_ptr()}"

    def send(self, endpoint: str, num_bytes: int, count: int) -> float:
        engine = self._start()
        session, address = endpoint.split(" ")
        source, target = self._buffer.data_ptr(), int(address)
        engine.transfer_sync_write(session, source, target, num_bytes)
        started = time.perf_counter()
        for index in range(count):
            offset = index * num_bytes % (self._buffer.nbytes - num_bytes + 1)
            if engine.transfer_sync_write(session, source + offset, target + offset, num_bytes) != 0:
                raise KVTransferError("Mooncake failed")
        return time.perf_counter() - started


class SharedMemoryLink(RawLink):
    """One copy into the opened arena: `memcpy`, or a peer copy between GPUs."""

    def __init__(self, arena: torch.Tensor, sharing: ArenaSharing) -> None:
        super().__init__(arena)
        self._sharing = sharing
        self._remote: RemoteArena | None = None

    def listen(self) -> str:
        return str(self._sharing.handle)

    def send(self, endpoint: str, num_bytes: int, count: int) -> float:
        if self._remote is None:
            self._remote = self._sharing.open_arena(endpoint, self._buffer.nbytes)
        self._remote.write(self._buffer, [(0, 0, num_bytes)])
        started = time.perf_counter()
        for index in range(count):
            offset = index * num_bytes % (self._buffer.nbytes - num_bytes + 1)
            self._remote.write(self._buffer, [(offset, offset, num_bytes)])
        return time.perf_counter() - started


class TorchLink(RawLink):
    """`send` and `recv` of a group of two: NCCL on GPUs, else gloo."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__(arena)
        self._group: Any = None
        self._store: Any = None

    def listen(self) -> str:
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, _TIMEOUT, wait_for_workers=False)
        return str(self._store.port)

    def _join(self, endpoint: str, rank: int) -> Any:
        if self._group is None:
            if self._store is None:
                self._store = dist.TCPStore("127.0.0.1", int(endpoint), None, False, _TIMEOUT, wait_for_workers=False)
            store = dist.PrefixStore("raw", self._store)
            if self._buffer.is_cuda:
                torch.cuda.set_device(self._buffer.device)
                self._group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
            else:
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
                options._timeout = _TIMEOUT
                self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        return self._group

    def send(self, endpoint: str, num_bytes: int, count: int) -> float:
        group = self._join(endpoint, 0)
        group.send([self._buffer[:num_bytes]], 1, 0).wait()
        self._synchronize()
        started = time.perf_counter()
        works = [group.send([self._piece(index, num_bytes)], 1, 0) for index in range(count)]
        for work in works:
            work.wait()
        self._synchronize()
        return time.perf_counter() - started

    def receive(self, endpoint: str, num_bytes: int, count: int) -> None:
        group = self._join(endpoint, 1)
        for index in (0, *range(count)):
            group.recv([self._piece(index, num_bytes)], 0, 0).wait()
        self._synchronize()

    def _piece(self, index: int, num_bytes: int) -> torch.Tensor:
        offset = index * num_bytes % (self._buffer.nbytes - num_bytes + 1)
        return self._buffer[offset : offset + num_bytes]


def raw_link(backend: str, arena: torch.Tensor, sharing: ArenaSharing) -> RawLink:
    """Make a link of the library under a backend.

    Raises:
        ConfigError: if it is not one of the built-in ones.
    """
    if backend == "shm":
        return SharedMemoryLink(arena, sharing)
    kinds: dict[str, type[RawLink]] = {"mooncake": MooncakeLink, "nccl": TorchLink}
    if backend not in kinds:
        raise ConfigError(f"--backend: {backend!r} is none of shm, {', '.join(kinds)}")
    return kinds[backend](arena)

"""KV transfer inside one host: the sender maps the receiver's arena and copies into it.

On CPU the arena is shared memory, on GPUs it is opened by CUDA IPC and written by peer copies.

A mapping cannot be taken away from a process, so an inbox closes when its sender has confirmed the
end of its writes, or is proven to be dead, or has begun another epoch, before which it ends them. A
sender that has stopped (SIGSTOP) proves nothing: what it may write to stays out of use until it goes
on or ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import cache
from pathlib import Path

import torch

from hbserve.errors import KVTransferError, StartupError
from hbserve.messages.transfer import Peer
from hbserve.pd_disagg.kv_transfer.base import KVTransferContext
from hbserve.pd_disagg.kv_transfer.one_sided import ArenaSharing, OneSidedKVTransfer
from hbserve.platform.remote_arena import ByteRun, RemoteArena


class SharedMemoryKVTransfer(OneSidedKVTransfer):
    """The ``shm`` backend of the configuration."""

    writes_end = True

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor, sharing: ArenaSharing) -> None:
        super().__init__(context, kv_blocks)
        assert sharing.handle is not None, "the arena of an instance with this backend is made to be shared"
        self._handle, self._open_arena = sharing.handle, sharing.open_arena
        self._opened: dict[tuple[int, int, int], RemoteArena] = {}  # by link: each is used in a thread of its own
        self._senders: dict[tuple[int, int, int], int] = {}  # link -> descriptor of the sender's process
        self._epochs: dict[int, int] = {}  # process -> its latest epoch
        self._new_epoch = asyncio.Condition()

    @property
    def endpoint(self) -> str:
        """``process host``: who writes, and where that number means this process."""
        return f"{os.getpid()} {_host()}"

    async def open_inbox(self, sources: list[Peer]) -> str:
        """``bytes handle``: of the arena.

        Raises:
            StartupError: if a sender is where its end could not be seen.
        """
        for source in sources:
            if source.endpoint.partition(" ")[2] != _host():
                raise StartupError(
                    "kv_transfer.backend shm: an instance is on another host, or in another container (PID namespace); "
                    "use nccl or mooncake"
                )
        for source in sources:
            pid = _process(source)
            with contextlib.suppress(ProcessLookupError):  # it is dead already, and will not write
                self._senders[_link(source)] = os.pidfd_open(pid)
            async with self._new_epoch:
                self._epochs[pid] = max(source.epoch, self._epochs.get(pid, 0))
                self._new_epoch.notify_all()
        return f"{self.kv_blocks.nbytes} {self._handle}"

    async def close_inbox(self, sources: list[Peer], senders_done: bool) -> None:
        for source in sources:
            descriptor = self._senders.pop(_link(source), None)
            if descriptor is None:
                continue
            try:
                if not senders_done:
                    await self._wait_until_harmless(descriptor, source)
            finally:
                os.close(descriptor)

    async def _wait_until_harmless(self, descriptor: int, source: Peer) -> None:
        loop = asyncio.get_running_loop()
        died: asyncio.Future[None] = loop.create_future()
        # A process' descriptor is readable once all its threads are gone.
        loop.add_reader(descriptor, _settle, died)
        began_anew = asyncio.create_task(self._begins_epoch_after(source))
        try:
            await asyncio.wait([died, began_anew], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(descriptor)
            began_anew.cancel()

    async def _begins_epoch_after(self, source: Peer) -> None:
        async with self._new_epoch:
            await self._new_epoch.wait_for(lambda: self._epochs[_process(source)] > source.epoch)

    def write(self, target: Peer, source: torch.Tensor, runs: list[ByteRun]) -> None:
        try:
            self._arena_of(target).write(source, runs)
        except (RuntimeError, OSError) as error:
            raise KVTransferError(f"cannot write to the receiver's arena, is it on this host? {error}") from None

    def _arena_of(self, target: Peer) -> RemoteArena:
        arena = self._opened.get(_link(target))
        if arena is None:
            num_bytes, _, handle = target.endpoint.partition(" ")
            arena = self._opened[_link(target)] = self._open_arena(handle, int(num_bytes))
        return arena

    def leave(self, target: Peer) -> None:
        """Memory of a receiver that has died is only free when nobody has it open."""
        arena = self._opened.pop(_link(target), None)
        if arena is not None:
            arena.close()

    async def stop(self) -> None:
        for descriptor in self._senders.values():
            os.close(descriptor)
        self._senders.clear()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@cache
def _host() -> str:
    """Differs wherever a process' number means another process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _process(source: Peer) -> int:
    return int(source.endpoint.partition(" ")[0])


def _link(source: Peer) -> tuple[int, int, int]:
    return source.rank, source.epoch, source.link_epoch

"""KV transfer inside one host: the sender maps the receiver's arena and copies into it.

On the CPU the arena is shared memory. On GPUs it is opened by CUDA IPC and written by peer copies. See `leases` for the
end of a receive window.
"""

from __future__ import annotations

import torch

from hbserve.errors import KVTransferError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.one_sided.base import ArenaSharing, OneSidedKVTransfer
from hbserve.kv_transfer.one_sided.leases import MappingLeases
from hbserve.messages.transfer import LinkKey, Peer
from hbserve.platform.remote_arena import ByteRun, RemoteArena


class SharedMemoryKVTransfer(OneSidedKVTransfer):
    """The ``shm`` backend of the configuration."""

    writes_end_soon = True

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor, sharing: ArenaSharing) -> None:
        super().__init__(context, kv_blocks)
        assert sharing.handle is not None, "the arena of an instance with this backend is made to be shared"
        self._handle, self._open_arena = sharing.handle, sharing.open_arena
        self._opened: dict[LinkKey, RemoteArena] = {}  # each is used in a thread of its own
        self._leases = MappingLeases("shm", context)

    @property
    def endpoint(self) -> str:
        """Endpoint of the leases."""
        return self._leases.endpoint

    async def start(self) -> None:
        await self._leases.start()

    async def open_receive_window(self, sources: list[Peer]) -> str:
        """Return ``bytes handle`` of the arena.

        Raises:
            StartupError: if the end of a sender could not be seen from here.
        """
        await self._leases.open_leases(sources)
        # the arena is larger than its blocks if a draft model has a part of it, or there is a spare block
        return f"{self.kv_blocks.untyped_storage().nbytes()} {self._handle}"

    async def close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        await self._leases.wait_until_over(sources, senders_done)

    def write(self, target: Peer, source: torch.Tensor, runs: list[ByteRun]) -> None:
        try:
            self._arena_of(target).write(source, runs)
        except (RuntimeError, OSError) as error:
            raise KVTransferError(f"cannot write to the receiver's arena, is it on this host? {error}") from None

    def connect(self, target: Peer) -> None:
        """Map the arena."""
        self._arena_of(target)

    def _arena_of(self, target: Peer) -> RemoteArena:
        arena = self._opened.get(target.link_key)
        if arena is None:
            num_bytes, _, handle = target.endpoint.partition(" ")
            arena = self._opened[target.link_key] = self._open_arena(handle, int(num_bytes))
        return arena

    def disconnect(self, target: Peer) -> None:
        """Close the arena: the memory of a dead receiver is free only when no process has it open."""
        arena = self._opened.pop(target.link_key, None)
        if arena is not None:
            arena.close()
        self._leases.end_lease(target)

    async def stop(self) -> None:
        await self._leases.stop()

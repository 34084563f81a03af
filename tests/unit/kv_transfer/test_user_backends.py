"""Transfers by a user's backend, which may do anything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest
import torch

from hbserve.errors import ConfigError, StartupError
from hbserve.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.kv_transfer.two_sided.staged_transfers import make_backend
from hbserve.messages.transfer import CloseLink, LinkClosed
from tests.support.transfer_sides import BLOCK_BYTES, NUM_BLOCKS, pair, sides


class WrongSize(KVTransferBase):
    """A user's backend that delivers too few bytes, and as rank 7 fails to start."""

    async def start(self) -> None:
        if self.context.rank == 7:
            raise OSError("no cable")

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        pass

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        return torch.zeros(7, dtype=torch.uint8)


class Stubborn(KVTransferBase):
    """A user's backend that ignores cancellations until ``go_on`` is set."""

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        await self._until(go_on)

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        await self._until(go_on)
        return torch.zeros(BLOCK_BYTES, dtype=torch.uint8)

    async def _until(self, event: asyncio.Event) -> None:
        while not event.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await event.wait()


go_on = asyncio.Event()


async def test_a_backend_that_ignores_a_cancellation_delays_and_writes_nothing() -> None:
    async with sides(backend=f"{__name__}:Stubborn") as (source, target):
        before = target.arena.clone()
        send, receive = pair("t", source, target, [1], [2])
        target.manager.handle(receive)
        source.manager.send(send)
        await asyncio.sleep(0.05)
        source.manager.cancel("t")
        target.manager.handle(CloseLink(source_id="source", link_epoch=0, sources=[source.peer()], senders_done=True))
        assert (await source.result()).error == "cancelled"
        assert (await target.result()).error == "cancelled"
        assert isinstance(await target.result(), LinkClosed)
        go_on.set()
        await asyncio.sleep(0.05)
        assert torch.equal(target.arena, before)


async def test_a_backend_that_delivers_the_wrong_size_is_a_failed_transfer() -> None:
    async with sides(backend=f"{__name__}:WrongSize") as (source, target):
        _, receive = pair("t", source, target, [1], [2])
        target.manager.handle(receive)
        result = await target.result()
        assert result.error is not None
        assert "7 bytes" in result.error


async def test_a_backend_that_cannot_be_imported_or_started_is_refused_by_name() -> None:
    context = KVTransferContext(0, 1, "127.0.0.1", None, torch.device("cpu"), 1.0, 1)
    with pytest.raises(ConfigError, match=r"kv_transfer.backend.*no_such_module"):
        make_backend("no_such_module:Backend", context)
    with pytest.raises(ConfigError, match="not a subclass"):
        make_backend("hbserve.messages.transfer:Peer", context)
    arena = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    manager = make_manager(f"{__name__}:WrongSize", dataclasses.replace(context, rank=7), arena, print)
    with pytest.raises(StartupError, match="WrongSize: OSError: no cable"):
        await manager.start()

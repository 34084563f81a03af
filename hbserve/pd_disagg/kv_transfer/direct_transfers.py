"""Transfers by a one-sided backend: the sender writes into the receiver's arena, the receiver only lets it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hbserve.messages.transfer import Peer, ReceiveBlocks, SendBlocks, TransferReply
from hbserve.pd_disagg.kv_transfer.manager import KVTransferManager, _Done
from hbserve.pd_disagg.kv_transfer.one_sided import BlockRun, OneSidedKVTransfer
from hbserve.pd_disagg.kv_transfer.outbox import Outbox


class DirectTransfers(KVTransferManager):
    """Runs transfers through a `OneSidedKVTransfer`. There is nothing to stage and nothing to match."""

    one_sided = True

    def __init__(self, backend: OneSidedKVTransfer, report: Callable[[TransferReply], None], tp_rank: int = 0) -> None:
        super().__init__(backend.context, backend.kv_blocks, report, tp_rank)
        self._backend = backend
        self._outboxes: dict[tuple[int, int, int], Outbox] = {}

    @property
    def endpoint(self) -> str:
        return self._backend.endpoint

    async def start(self) -> None:
        await self._backend.start()

    async def cancel_all(self) -> None:
        await super().cancel_all()
        await asyncio.gather(*(outbox.close() for outbox in self._outboxes.values()))
        self._outboxes.clear()

    async def stop(self) -> None:
        await self._backend.stop()

    async def _send(self, command: SendBlocks, target: Peer) -> float:
        return await self._outbox(target).put(command.block_ids, command.target_block_ids)

    async def _receive(self, command: ReceiveBlocks, source: Peer) -> _Done:
        raise AssertionError("nothing is to be received from a sender that writes by itself")

    async def _open_inbox(self, source: Peer) -> str:
        return await self._backend.open_inbox(source)

    async def _close_inbox(self, source: Peer, sender_done: bool) -> None:
        await self._backend.close_inbox(source, sender_done)

    def _outbox(self, target: Peer) -> Outbox:
        link = (target.rank, target.epoch, target.link_epoch)
        if link not in self._outboxes:
            for other in [key for key in self._outboxes if key[0] == target.rank and key < link]:
                self._outboxes.pop(other).abandon()
            batch_blocks = max(1, self._context.buffer_size // self._kv_blocks.shape[1])

            def write(runs: list[BlockRun]) -> None:
                self._backend.write(target, runs)

            self._outboxes[link] = Outbox(write, batch_blocks, self._backend.writes_end)
        return self._outboxes[link]

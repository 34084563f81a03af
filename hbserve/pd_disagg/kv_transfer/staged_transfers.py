"""Transfers by a backend with two ends: gathered into a buffer, sent, received, written to the arena."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from hbserve.errors import KVTransferError
from hbserve.import_path import load_class
from hbserve.messages.transfer import Peer, ReceiveBlocks, SendBlocks, TransferReply
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.pd_disagg.kv_transfer.byte_budget import ByteBudget
from hbserve.pd_disagg.kv_transfer.manager import KVTransferManager, _Done


def make_backend(name: str, context: KVTransferContext) -> KVTransferBase:
    """The backend with two ends that ``kv_transfer.backend`` names.

    Raises:
        ConfigError: if it cannot be imported.
    """
    if name == "nccl":
        from hbserve.pd_disagg.kv_transfer.torch_distributed import TorchDistributedKVTransfer

        return TorchDistributedKVTransfer(context)
    return load_class(name, KVTransferBase, "kv_transfer.backend")(context)  # type: ignore[type-abstract]


class StagedTransfers(KVTransferManager):
    """Runs transfers through a `KVTransferBase`.

    A received buffer is written to the arena in one go after all its bytes are there, and a transfer
    that is given up meanwhile ends only after that: after its `TransferResult` nothing is written.
    """

    one_sided = False

    def __init__(
        self,
        backend: KVTransferBase,
        kv_blocks: torch.Tensor,
        report: Callable[[TransferReply], None],
        tp_rank: int = 0,
    ) -> None:
        super().__init__(backend.context, kv_blocks, report, tp_rank)
        self._backend = backend
        self._staging = ByteBudget(backend.context.buffer_size)
        self._receiving: dict[tuple[int, int, int], set[str]] = {}  # transfers by link

    @property
    def endpoint(self) -> str:
        return self._backend.endpoint

    async def start(self) -> None:
        await self._backend.start()

    async def stop(self) -> None:
        await self._backend.stop()

    async def _send(self, command: SendBlocks, target: Peer) -> float:
        loop = asyncio.get_running_loop()
        num_bytes = len(command.block_ids) * self._kv_blocks.shape[1]
        self._backend.add_peer(target)
        asked_at = loop.time()
        await self._staging.take(num_bytes)
        queued_s = loop.time() - asked_at
        try:
            buffer = await asyncio.to_thread(self._gather, command.block_ids)
            await self._backend.send_kv_cache(command.transfer_id, buffer, target.rank)
        finally:
            await self._staging.give_back(num_bytes)
        return queued_s

    async def _receive(self, command: ReceiveBlocks, source: Peer) -> _Done:
        of_link = self._receiving.setdefault(_link(source), set())
        of_link.add(command.transfer_id)
        try:
            self._backend.add_peer(source)
            buffer = await self._backend.receive_kv_cache(command.transfer_id, source.rank)
            expected = len(command.block_ids) * self._kv_blocks.shape[1]
            if buffer.nbytes != expected:
                raise KVTransferError(f"received {buffer.nbytes} bytes where {expected} were expected")
            rows = buffer.contiguous().view(torch.uint8).view(len(command.block_ids), -1)
            await _to_its_end(asyncio.to_thread(self._scatter, command.block_ids, rows))
        finally:
            of_link.discard(command.transfer_id)
        return _Done()

    async def _open_inbox(self, source: Peer) -> str:
        return self._backend.endpoint

    async def _close_inbox(self, source: Peer, sender_done: bool) -> None:
        await self._cancel_and_wait(self._receiving.pop(_link(source), set()))

    @torch.inference_mode()
    def _gather(self, block_ids: list[int]) -> torch.Tensor:
        with self._beside_the_steps():
            index = torch.tensor(block_ids, device=self._kv_blocks.device)
            return self._kv_blocks.index_select(0, index)

    @torch.inference_mode()
    def _scatter(self, block_ids: list[int], rows: torch.Tensor) -> None:
        with self._beside_the_steps():
            index = torch.tensor(block_ids, device=self._kv_blocks.device)
            self._kv_blocks.index_copy_(0, index, rows.to(self._kv_blocks.device))


def _link(source: Peer) -> tuple[int, int, int]:
    return source.rank, source.epoch, source.link_epoch


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for work that cannot be broken off; a cancellation meanwhile takes effect after it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        raise

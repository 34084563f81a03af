"""Transfers between a rank's KV arena and the wire, whatever the backend."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hbserve.errors import KVTransferError, StaleBlockError
from hbserve.import_path import load_class
from hbserve.messages import Peer, ReceiveBlocks, SendBlocks, TransferResult
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.pd_disagg.kv_transfer.byte_budget import ByteBudget

logger = logging.getLogger(__name__)


def make_backend(name: str, context: KVTransferContext) -> KVTransferBase:
    """The backend that ``kv_transfer.backend`` names.

    Raises:
        ConfigError: if it cannot be imported.
    """
    if name == "nccl":
        from hbserve.pd_disagg.kv_transfer.torch_distributed import TorchDistributedKVTransfer

        return TorchDistributedKVTransfer(context)
    return load_class(name, KVTransferBase, "kv_transfer.backend")(context)  # type: ignore[type-abstract]


class KVTransferManager:
    """Runs the transfers that the scheduler asks for; each ends in exactly one `TransferResult`.

    A received buffer is written to the arena in one go after all its bytes are there, and only
    while the transfer has not been given up: after its `TransferResult` nothing is written.

    Args:
        backend: started by the caller.
        kv_blocks: the arena as ``[block, byte]``, uint8.
        report: called with each result, in the event loop.
        tp_rank: of this arena in its instance; the same rank of the other instance has the other end.
    """

    def __init__(
        self,
        backend: KVTransferBase,
        kv_blocks: torch.Tensor,
        report: Callable[[TransferResult], None],
        tp_rank: int = 0,
    ) -> None:
        self._backend = backend
        self._tp_rank = tp_rank
        self._kv_blocks = kv_blocks
        self._report = report
        self._tasks: dict[tuple[str, bool], asyncio.Task[None]] = {}
        # Of transfers whose command has not come yet, or whose result had left: bounded, so no need to tell which.
        self._cancelled_early: deque[str] = deque(maxlen=1024)
        self._seen_generation = torch.full((kv_blocks.shape[0],), -1, dtype=torch.int64)
        self._stream = torch.cuda.Stream(kv_blocks.device) if kv_blocks.is_cuda else None  # type: ignore[no-untyped-call]
        self._staging = ByteBudget(backend.context.buffer_size)

    def send(self, command: SendBlocks) -> None:
        """Start sending; the blocks' contents must be final."""
        self._start(command, True, self._transfer(command, command.targets[self._tp_rank]))

    def receive(self, command: ReceiveBlocks) -> None:
        """Start receiving."""
        self._start(command, False, self._transfer(command, command.sources[self._tp_rank]))

    def cancel(self, transfer_id: str) -> None:
        """Give up on both sides of a transfer that are here, or will be; their results say so."""
        tasks = [task for sent in (True, False) if (task := self._tasks.get((transfer_id, sent))) is not None]
        for task in tasks:
            task.cancel()
        if not tasks:
            self._cancelled_early.append(transfer_id)

    async def cancel_all(self) -> None:
        """Give up on everything and wait until nothing more will be written."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._seen_generation.fill_(-1)

    def _start(self, command: SendBlocks | ReceiveBlocks, sent: bool, transfer: Coroutine[None, None, None]) -> None:
        key = (command.transfer_id, sent)
        assert key not in self._tasks, f"transfer {command.transfer_id} is started twice"
        started = time.monotonic()
        task = self._tasks[key] = asyncio.create_task(transfer)
        # A callback, not code at the coroutine's end: a task that is cancelled before it runs has no end.
        task.add_done_callback(lambda done: self._finish(command, sent, started, done))
        if command.transfer_id in self._cancelled_early:
            self._cancelled_early.remove(command.transfer_id)
            task.cancel()

    async def _transfer(self, command: SendBlocks | ReceiveBlocks, peer: Peer) -> None:
        self._refuse_stale(command)
        self._backend.add_peer(peer)
        timeout_s = self._backend.context.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(command, SendBlocks):
                    await self._send(command, peer)
                else:
                    await self._receive(command, peer)
        except TimeoutError:
            raise KVTransferError(f"not complete within {timeout_s:g} s") from None

    def _finish(
        self, command: SendBlocks | ReceiveBlocks, sent: bool, started: float, task: asyncio.Task[None]
    ) -> None:
        del self._tasks[command.transfer_id, sent]
        error: str | None = None
        if task.cancelled():
            error = "cancelled"
        elif (failure := task.exception()) is not None:
            error = str(failure)
            if not isinstance(failure, KVTransferError | StaleBlockError):
                # A user's backend may raise anything; the request must go on.
                logger.error("transfer %s failed in the backend", command.transfer_id, exc_info=failure)
                error = f"{type(failure).__name__}: {failure}"
        num_bytes = len(command.block_ids) * self._kv_blocks.shape[1]
        self._report(
            TransferResult(
                epoch=self._backend.context.epoch,
                transfer_id=command.transfer_id,
                sent=sent,
                num_bytes=num_bytes if error is None else 0,
                seconds=time.monotonic() - started,
                error=error,
            )
        )

    async def _send(self, command: SendBlocks, target: Peer) -> None:
        num_bytes = len(command.block_ids) * self._kv_blocks.shape[1]
        await self._staging.take(num_bytes)
        try:
            buffer = await asyncio.to_thread(self._gather, command.block_ids)
            await self._backend.send_kv_cache(command.transfer_id, buffer, target.rank)
        finally:
            await self._staging.give_back(num_bytes)

    async def _receive(self, command: ReceiveBlocks, source: Peer) -> None:
        buffer = await self._backend.receive_kv_cache(command.transfer_id, source.rank)
        expected = len(command.block_ids) * self._kv_blocks.shape[1]
        if buffer.nbytes != expected:
            raise KVTransferError(f"received {buffer.nbytes} bytes where {expected} were expected")
        rows = buffer.contiguous().view(torch.uint8).view(len(command.block_ids), -1)
        # No await between here and the result: once written it is reported, once given up not written.
        self._scatter(command.block_ids, rows)

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

    @contextmanager
    def _beside_the_steps(self) -> Iterator[None]:
        """On a GPU: on a stream of its own, done when it returns.

        No order with the steps is needed: blocks that leave are final, as their step's result is
        here, and blocks that arrive are in no plan before this transfer's result.
        """
        if not self._kv_blocks.is_cuda:
            yield
            return
        stream: Any = self._stream
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def _refuse_stale(self, command: SendBlocks | ReceiveBlocks) -> None:
        index = torch.tensor(command.block_ids, dtype=torch.int64)
        generations = torch.tensor(command.generations, dtype=torch.int64)
        stale = (generations < self._seen_generation[index]).nonzero()
        if len(stale):
            block = int(index[stale[0]])
            raise StaleBlockError(
                f"transfer {command.transfer_id}: block {block} has been reused since generation "
                f"{int(generations[stale[0]])}"
            )
        self._seen_generation[index] = generations

"""Transfers by a user's backend: blocks are gathered into a buffer, sent, received, and written to the arena.

Runs in the event loop of a rank process; copies between arena and buffers run in worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import TypeVar

import torch

from hbserve.errors import HBServeError, KVTransferError, StartupError
from hbserve.import_path import load_class
from hbserve.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.kv_transfer.block_parts import BlockParts
from hbserve.kv_transfer.head_split import WHOLE, Part, Route, Shard
from hbserve.kv_transfer.manager import KVTransferManager, Report, cancel_and_wait, wait_despite_cancel
from hbserve.kv_transfer.two_sided.buffers import ByteBudget
from hbserve.messages.transfer import LinkKey, Peer, ReceiveBlocks, SendBlocks

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_S = 1.0
"""Time for a user's method to end after it was cancelled."""


def make_backend(name: str, context: KVTransferContext) -> KVTransferBase:
    """Make the user's backend that ``kv_transfer.backend`` names.

    Raises:
        ConfigError: if it cannot be imported.
        StartupError: if it cannot be made.
    """
    kind = load_class(name, KVTransferBase, "kv_transfer.backend")  # type: ignore[type-abstract]
    with _startup_errors(name):
        return kind(context)


@contextlib.contextmanager
def _startup_errors(name: str) -> Iterator[None]:
    """Turn what a user's backend raises, which may be anything, into a `StartupError`."""
    try:
        yield
    except HBServeError:
        raise
    except Exception as error:
        logger.exception("kv_transfer.backend %s", name)
        raise StartupError(f"kv_transfer.backend {name}: {type(error).__name__}: {error}") from error


class StagedTransfers(KVTransferManager):
    """Transfers through a `KVTransferBase`.

    A received buffer is written to the arena in one go after all its bytes have arrived. A transfer that is cancelled
    meanwhile ends only after that, so nothing is written after its `TransferResult`. The user's methods see buffers
    alone, never the arena. One that goes on although it was cancelled therefore delays nothing: it is left alone, and
    its result is dropped.
    """

    one_sided = False

    def __init__(self, backend: KVTransferBase, kv_blocks: torch.Tensor, report: Report, shard: Shard) -> None:
        super().__init__(backend.context, kv_blocks, report, shard)
        self._backend = backend
        self._staging = ByteBudget(backend.context.buffer_size)
        self._receiving: dict[LinkKey, set[str]] = {}  # transfers by link

    @property
    def endpoint(self) -> str:
        return self._backend.endpoint

    async def start(self) -> None:
        with _startup_errors(type(self._backend).__name__):
            await self._backend.start()
        await asyncio.to_thread(self._rehearse)

    async def stop(self) -> None:
        await self._backend.stop()

    async def _send(self, command: SendBlocks, target: Peer, route: Route) -> float:
        loop = asyncio.get_running_loop()
        parts = self._parts.of_layers(command.layers)
        shape = len(command.block_ids), parts.part_bytes(route.source_part)
        num_bytes = shape[0] * shape[1]
        self._backend.add_peer(target)
        asked_at_s = loop.time()
        await self._staging.reserve(num_bytes)
        queued_s = loop.time() - asked_at_s
        sending = asyncio.create_task(self._take_and_send(command, target, parts, route, shape))
        # In a callback: a user's method that goes on after its cancellation still has the buffer.
        sending.add_done_callback(lambda _: self._staging.free(num_bytes))
        await _result_of(sending, "send_kv_cache")
        return queued_s

    async def _take_and_send(
        self, command: SendBlocks, target: Peer, parts: BlockParts, route: Route, shape: tuple[int, int]
    ) -> None:
        buffer = await asyncio.to_thread(self._take, parts, command.block_ids, route.source_part, shape)
        await self._backend.send_kv_cache(command.transfer_id, buffer, target.rank)

    async def _receive(self, command: ReceiveBlocks, source: Peer, route: Route) -> None:
        of_link = self._receiving.setdefault(source.link_key, set())
        of_link.add(command.transfer_id)
        try:
            self._backend.add_peer(source)
            work = self._backend.receive_kv_cache(command.transfer_id, source.rank)
            buffer = await _result_of(asyncio.ensure_future(work), "receive_kv_cache")
            parts = self._parts.of_layers(command.layers)
            expected = len(command.block_ids) * parts.part_bytes(route.target_part)
            if not isinstance(buffer, torch.Tensor):
                raise KVTransferError(f"receive_kv_cache returned {type(buffer).__name__}, not a tensor")
            if buffer.nbytes != expected:
                raise KVTransferError(f"received {buffer.nbytes} bytes where {expected} were expected")
            rows = buffer.contiguous().view(torch.uint8).view(len(command.block_ids), -1)
            put = asyncio.to_thread(self._put, parts, command.block_ids, route.target_part, rows)
            await wait_despite_cancel(asyncio.create_task(put))
        finally:
            of_link.discard(command.transfer_id)

    async def _open_receive_window(self, sources: list[Peer], routes: list[Route]) -> str:
        return self._backend.endpoint

    async def _close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        for source in sources:
            receiving = [(transfer_id, False) for transfer_id in self._receiving.pop(source.link_key, ())]
            await cancel_and_wait([self._tasks[key] for key in receiving if key in self._tasks])

    def _rehearse(self) -> None:
        with self._transfer_stream():
            self._parts.rehearse(WHOLE, self._kv_blocks.device)

    def _take(self, parts: BlockParts, block_ids: list[int], part: Part, shape: tuple[int, int]) -> torch.Tensor:
        with self._transfer_stream():
            buffer = torch.empty(shape, dtype=torch.uint8, device=self._kv_blocks.device)
            parts.take(block_ids, part, buffer)
            return buffer

    def _put(self, parts: BlockParts, block_ids: list[int], part: Part, rows: torch.Tensor) -> None:
        with self._transfer_stream():
            parts.put(block_ids, part, rows)


async def _result_of(work: asyncio.Future[T], name: str) -> T:
    """Return the result of a user's method; if this task is cancelled, give the method a moment to end."""
    try:
        await asyncio.wait([work])
    except asyncio.CancelledError:
        work.cancel()
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # mark it as seen
        if not (await asyncio.wait([work], timeout=_GRACE_S))[0]:
            logger.error("kv_transfer.backend: %s goes on although it was cancelled", name)
        raise
    return work.result()

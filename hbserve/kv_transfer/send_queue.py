"""Queue of the transfers to be written on one link. Owned by the event loop; one thread of its own does the writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hbserve.errors import KVTransferError
from hbserve.messages.transfer import SendBlocks

MAX_BATCH_ITEMS = 64
"""Items in one write."""


class SendItem:
    """Blocks of one transfer, and the future ``written``, which is done when they have been written."""

    def __init__(self, command: SendBlocks) -> None:
        self.transfer_id, self.layers = command.transfer_id, command.layers
        self.source_blocks, self.target_blocks = command.block_ids, command.target_block_ids
        self.written: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.queued_at_s = time.monotonic()


class SendQueue:
    """Writes of one link: items that gather during one write leave together with the next.

    Args:
        write: sends items; blocks; called in the queue's thread.
        max_batch_blocks: limit of the blocks in one write, unless a single item exceeds it.
        writes_end_soon: see `OneSidedKVTransfer.writes_end_soon`.
        on_start: called first, in the queue's thread. Its failure is not reported, because the first write would fail,
            too.
        on_end: called after the last write, in the queue's thread.
    """

    def __init__(
        self,
        write: Callable[[list[SendItem]], None],
        max_batch_blocks: int,
        writes_end_soon: bool,
        on_start: Callable[[], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._write = write
        self._max_batch_blocks = max_batch_blocks
        self._writes_end = writes_end_soon
        self._on_end: Callable[[], None] | None = on_end
        self._waiting: deque[SendItem] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-send")
        self._thread.submit(on_start)
        self._writer: asyncio.Task[None] | None = None
        self._broken: KVTransferError | None = None  # never raised: its frames would hold the queue

    async def put(self, item: SendItem) -> float:
        """Send an item; return the seconds that it spent waiting for other items.

        Raises:
            KVTransferError: if this or an earlier write on the link has failed.
        """
        if self._broken is not None:
            raise self._broken.bare()
        self._waiting.append(item)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_batches())
        try:
            return await asyncio.shield(item.written)
        except asyncio.CancelledError:
            if item in self._waiting:
                self._waiting.remove(item)
            elif self._writes_end:
                await wait_until_done(item.written)
            raise

    async def _write_batches(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft()]
            num_blocks = len(batch[0].source_blocks)
            while (
                self._waiting
                and len(batch) < MAX_BATCH_ITEMS
                and num_blocks + len(self._waiting[0].source_blocks) <= self._max_batch_blocks
            ):
                batch.append(self._waiting.popleft())
                num_blocks += len(batch[-1].source_blocks)
            started_s = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._write, batch)
            except Exception as error:
                self._break(error.bare() if isinstance(error, KVTransferError) else KVTransferError(repr(error)), batch)
                return
            ended_s = time.monotonic()
            for item in batch:
                share_s = (ended_s - started_s) * len(item.source_blocks) / num_blocks
                item.written.set_result(ended_s - item.queued_at_s - share_s)

    def _break(self, error: KVTransferError, batch: list[SendItem]) -> None:
        self._broken = error
        for item in (*batch, *self._waiting):
            item.written.set_exception(error.bare())
            item.written.exception()  # mark it as seen: a cancelled transfer does not look at it
        self._waiting.clear()

    async def close(self) -> None:
        """Start no more writes; if writes end soon by themselves, wait for the one in flight."""
        if self._writes_end and self._writer is not None:
            self._waiting.clear()
            await asyncio.wait([self._writer])
        self.abandon()

    def abandon(self) -> None:
        """Start no more writes, and do not wait for the one in flight."""
        self._break(self._broken or KVTransferError("the link was closed"), [])
        if self._on_end is not None:
            self._thread.submit(self._on_end)
            self._on_end = None
        self._thread.shutdown(wait=False)


async def wait_until_done(future: asyncio.Future[Any]) -> None:
    """Wait for a future, and go on waiting if this task is cancelled: until then the arena is in use."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])

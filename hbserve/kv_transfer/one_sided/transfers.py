"""Transfers by a one-sided backend: the sender writes into the receiver's arena, and the receiver only permits it.

`DirectTransfers` runs in the event loop of a rank process; each link's `_Writer` runs in the thread of its `SendQueue`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from hbserve.kv_transfer.block_parts import BlockParts
from hbserve.kv_transfer.head_split import WHOLE, Route, Shard
from hbserve.kv_transfer.manager import KVTransferManager, Report
from hbserve.kv_transfer.one_sided.base import OneSidedKVTransfer
from hbserve.kv_transfer.send_queue import SendItem, SendQueue
from hbserve.messages.transfer import LayerGroup, LinkKey, Peer, ReceiveBlocks, SendBlocks
from hbserve.platform.remote_arena import ByteRun

_STAGING_BYTES = 64 << 20
"""Size of the memory in which parts of blocks are gathered before they leave, for each target rank."""


class DirectTransfers(KVTransferManager):
    """Transfers through a `OneSidedKVTransfer`. There is nothing to stage and nothing to match."""

    one_sided = True

    def __init__(self, backend: OneSidedKVTransfer, report: Report, shard: Shard) -> None:
        super().__init__(backend.context, backend.kv_blocks, report, shard)
        self._backend = backend
        self._queues: dict[LinkKey, SendQueue] = {}

    @property
    def endpoint(self) -> str:
        return self._backend.endpoint

    async def start(self) -> None:
        await self._backend.start()

    async def cancel_all(self) -> None:
        await super().cancel_all()
        await asyncio.gather(*(queue.close() for queue in self._queues.values()))
        self._queues.clear()

    async def stop(self) -> None:
        await self._backend.stop()

    async def _send(self, command: SendBlocks, target: Peer, route: Route) -> float:
        return await self._queue_to(target, route).put(SendItem(command))

    async def _receive(self, command: ReceiveBlocks, source: Peer, route: Route) -> None:
        raise AssertionError("a one-sided sender writes by itself; nothing is received from it")

    async def _open_receive_window(self, sources: list[Peer], routes: list[Route]) -> str:
        return await self._backend.open_receive_window(sources)

    async def _close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        await self._backend.close_receive_window(sources, senders_done)

    def _connect(self, target: Peer, route: Route) -> None:
        self._queue_to(target, route)

    def _disconnect(self, target: Peer) -> None:
        queue = self._queues.pop(target.link_key, None)
        if queue is not None:
            queue.abandon()
        else:
            self._backend.disconnect(target)

    def _queue_to(self, target: Peer, route: Route) -> SendQueue:
        link = target.link_key
        if link not in self._queues:
            for older in [key for key in self._queues if key[0] == target.rank and key < link]:
                self._queues.pop(older).abandon()
            batch_blocks = max(1, self._context.buffer_size // self._kv_blocks.shape[1])
            write = _Writer(self._backend, self._parts, self._transfer_stream, target, route)

            def connect() -> None:
                self._backend.connect(target)
                write.prepare()

            disconnect = functools.partial(self._backend.disconnect, target)
            self._queues[link] = SendQueue(write, batch_blocks, self._backend.writes_end_soon, connect, disconnect)
        return self._queues[link]


class _Writer:
    """Writer of items to one rank, used in one thread.

    A part of each row would be a thousand small pieces in every block, so it is never sent row by row. If the receiver
    holds less of each row, the sender gathers the part before (``staging``). If the receiver holds more, the sender's
    whole block becomes one stretch of the receiver's block, and the receiver sorts the rows when all stretches have
    arrived (`FinishBlocks`).
    """

    def __init__(
        self,
        backend: OneSidedKVTransfer,
        parts: BlockParts,
        transfer_stream: Callable[[], AbstractContextManager[None]],
        target: Peer,
        route: Route,
    ) -> None:
        self._backend, self._parts, self._transfer_stream = backend, parts, transfer_stream
        self._target, self._route = target, route
        self._staging_bytes = max(parts.part_bytes(route.source_part), min(_STAGING_BYTES, backend.context.buffer_size))
        self._staging: torch.Tensor | None = None

    def prepare(self) -> None:
        """Allocate what the first write would, and load the kernels of its copies: both stop the steps of a GPU."""
        if self._route.source_part != WHOLE:
            staging = self._make_staging()
            with self._transfer_stream():
                self._parts.rehearse(self._route.source_part, staging.device)

    def _make_staging(self) -> torch.Tensor:
        if self._staging is None:
            with self._transfer_stream():  # else it is memory that a step has freed and its kernels still use
                self._staging = self._backend.make_staging(self._target, self._staging_bytes)
        return self._staging

    def __call__(self, items: list[SendItem]) -> None:
        for layers, group in itertools.groupby(items, lambda item: item.layers):
            blocks = [pair for item in group for pair in zip(item.source_blocks, item.target_blocks, strict=True)]
            if self._route.source_part == WHOLE:
                block_bytes = self._parts.kv_blocks.shape[1]
                first = layers.index * (block_bytes // layers.count)
                pieces = [(here * block_bytes + first, there) for here, there in blocks]
                self._write(self._parts.kv_blocks, pieces, layers)
            else:
                self._gather_and_write(blocks, layers)

    def _gather_and_write(self, blocks: list[tuple[int, int]], layers: LayerGroup) -> None:
        parts = self._parts.of_layers(layers)
        part_bytes = parts.part_bytes(self._route.source_part)
        staging = self._make_staging()
        max_blocks = self._staging_bytes // part_bytes
        for first in range(0, len(blocks), max_blocks):
            group = blocks[first : first + max_blocks]
            out = staging[: len(group) * part_bytes].view(len(group), part_bytes)
            with self._transfer_stream():
                parts.take([source for source, _ in group], self._route.source_part, out)
            self._write(staging, [(index * part_bytes, there) for index, (_, there) in enumerate(group)], layers)

    def _write(self, source: torch.Tensor, pieces: list[tuple[int, int]], layers: LayerGroup) -> None:
        """Write pieces: each is an offset in ``source``, and the target block of which it is a stretch."""
        part = self._route.target_part
        part_bytes = self._parts.of_layers(layers).part_bytes(self._route.source_part)
        block_bytes = part_bytes * part.count * layers.count
        first = part_bytes * (part.count * layers.index + part.index)
        self._backend.write(
            self._target, source, coalesce(((here, there * block_bytes + first) for here, there in pieces), part_bytes)
        )


def coalesce(pieces: Iterable[tuple[int, int]], num_bytes: int) -> list[ByteRun]:
    """Join pieces of ``num_bytes`` into the fewest runs, because links are fast with large pieces.

    Args:
        pieces: offset of each piece in the source and in the target.
    """
    runs: list[ByteRun] = []
    for source, target in sorted(pieces):
        if runs:
            first_source, first_target, length = runs[-1]
            if source == first_source + length and target == first_target + length:
                runs[-1] = (first_source, first_target, length + num_bytes)
                continue
        runs.append((source, target, num_bytes))
    return runs

"""Transfers between a rank's KV arena and its peers, independent of the backend.

A manager runs in the event loop of its rank process, and all its methods are called there. Checksums and merges run in
worker threads, on a GPU on a stream of their own. The package's docstring numbers the steps of a transfer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from hbserve.errors import HBServeError, KVTransferError, StaleBlockError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.block_parts import BlockParts
from hbserve.kv_transfer.head_split import Part, Route, Shard
from hbserve.kv_transfer.send_queue import wait_until_done
from hbserve.messages.transfer import (
    CancelTransfer,
    CloseLink,
    ConnectLink,
    DisconnectLink,
    FinishBlocks,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferCommand,
    TransferReply,
    TransferResult,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

Report = Callable[[TransferReply], None]

_BlockCommand = SendBlocks | ReceiveBlocks | FinishBlocks


class _Success(NamedTuple):
    """Facts about one side of a transfer that succeeded."""

    queued_s: float = 0.0
    checksums: list[int] | None = None


class KVTransferManager(ABC):
    """Runs the transfers that the scheduler asks for; each side of a transfer ends in exactly one `TransferResult`.

    Args:
        context: facts about the rank.
        kv_blocks: the arena as ``[block, byte]``, uint8.
        report: called with each reply, in the event loop.
        shard: the KV heads that this arena holds.
    """

    one_sided: bool
    """Whether the sender's result alone says that the blocks have arrived."""

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor, report: Report, shard: Shard) -> None:
        self._context = context
        self._shard = shard
        self._kv_blocks = kv_blocks
        self._parts = BlockParts(kv_blocks, shard.num_rows)
        self._report = report
        self._tasks: dict[tuple[str, bool], asyncio.Task[_Success]] = {}
        self._link_tasks: set[asyncio.Task[None]] = set()
        self._opening: dict[tuple[str, int], asyncio.Task[None]] = {}  # by source and epoch of the link
        self._merging: set[asyncio.Task[None]] = set()
        # Transfers that have not started yet or had already ended: these look the same, hence the bound.
        self._cancelled_early: deque[str] = deque(maxlen=1024)
        self._seen_generation = torch.full((kv_blocks.shape[0],), -1, dtype=torch.int64)
        self._stream = torch.cuda.Stream(kv_blocks.device) if kv_blocks.is_cuda else None  # type: ignore[no-untyped-call]

    @property
    def is_busy(self) -> bool:
        """Whether a transfer, or the opening of a link, is under way. Callable from any thread."""
        return bool(self._tasks or self._opening)

    # --- called by the rank process ----------------------------------------------------------------

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """Address of this rank that peers learn when the epoch begins; they learn more when a link opens."""

    @abstractmethod
    async def start(self) -> None:
        """Get ready; called before all other methods.

        Raises:
            HBServeError: if the backend cannot start.
        """

    def send(self, command: SendBlocks) -> None:
        """Start sending blocks, whose contents must be final."""
        self._start(command, True, self._send_all(command))

    def handle(self, command: TransferCommand) -> None:
        """Start to execute a command of the scheduler."""
        match command:
            case ReceiveBlocks():
                self._start(command, False, self._receive_all(command))
            case FinishBlocks():
                self._start(command, False, self._finish_blocks(command))
            case CancelTransfer():
                self.cancel(command.transfer_id)
            case ConnectLink():
                for route in self._shard.outgoing(len(command.targets)):
                    self._connect(command.targets[route.target], route)
            case DisconnectLink():
                for target in command.targets:
                    self._disconnect(target)
            case OpenLink():
                link = command.source_id, command.link_epoch
                self._opening[link] = task = self._start_link_task(self._open_link(command))
                task.add_done_callback(lambda _: self._opening.pop(link))
            case CloseLink():
                opening = self._opening.get((command.source_id, command.link_epoch))
                self._start_link_task(self._close_link(command, opening))

    def _start_link_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._link_tasks.add(task)
        task.add_done_callback(self._link_tasks.discard)
        return task

    def cancel(self, transfer_id: str) -> None:
        """Cancel the sides of a transfer that run here or will be started here; each one reports it as its result."""
        tasks = [self._tasks[key] for key in ((transfer_id, True), (transfer_id, False)) if key in self._tasks]
        for task in tasks:
            task.cancel()
        if not tasks:
            self._cancelled_early.append(transfer_id)

    async def cancel_all(self) -> None:
        """Cancel all transfers and link changes, and wait until this side writes nothing more."""
        await cancel_and_wait([*self._tasks.values(), *self._link_tasks])
        self._seen_generation.fill_(-1)

    @abstractmethod
    async def stop(self) -> None:
        """Free everything, after `cancel_all`; after this the other side writes nothing more either."""

    # --- for the two kinds of backend --------------------------------------------------------------

    @abstractmethod
    async def _send(self, command: SendBlocks, target: Peer, route: Route) -> float:
        """Move a part of each block to one rank; return the seconds spent waiting for other transfers."""

    @abstractmethod
    async def _receive(self, command: ReceiveBlocks, source: Peer, route: Route) -> None:
        """Move a part of each block here from one rank."""

    @abstractmethod
    async def _open_receive_window(self, sources: list[Peer], routes: list[Route]) -> str:
        """Get ready to receive on a link from these ranks over these routes; return the endpoint for the senders."""

    @abstractmethod
    async def _close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        """Return when nothing that was sent on the link is written any more."""

    def _connect(self, target: Peer, route: Route) -> None:  # noqa: B027 - not all backends need it
        """Get ready to send to a rank, on a link that has just opened."""

    def _disconnect(self, target: Peer) -> None:  # noqa: B027 - likewise
        """Free what is kept for sending to a rank, on a link that has ended; its transfers have been cancelled."""

    @contextmanager
    def _transfer_stream(self) -> Iterator[None]:
        """Run the block, on a GPU on the manager's own stream, and wait for it.

        The stream needs no order with the steps: blocks to send are final before their transfer starts, and received
        blocks are in no plan before this transfer's result.
        """
        if not self._kv_blocks.is_cuda:
            yield
            return
        stream: Any = self._stream
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    # --- transfers -------------------------------------------------------------------------------

    def _start(self, command: _BlockCommand, sent: bool, transfer: Coroutine[None, None, _Success]) -> None:
        key = (command.transfer_id, sent)
        assert key not in self._tasks, f"transfer {command.transfer_id} is started twice"
        started_s = time.monotonic()
        task = self._tasks[key] = asyncio.create_task(self._within_limits(command, transfer))
        # A callback, not code at the end of the coroutine: a task that is cancelled before it runs never gets there.
        task.add_done_callback(lambda done: self._on_end(command, sent, started_s, done))
        task.add_done_callback(lambda _: transfer.close())
        if command.transfer_id in self._cancelled_early:
            self._cancelled_early.remove(command.transfer_id)
            task.cancel()

    async def _within_limits(self, command: _BlockCommand, transfer: Coroutine[None, None, _Success]) -> _Success:
        self._check_generations(command)
        timeout_s = self._context.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await transfer
        except TimeoutError:
            raise KVTransferError(f"not complete within {timeout_s:g} s", "timeout") from None

    def _on_end(self, command: _BlockCommand, sent: bool, started_s: float, task: asyncio.Task[_Success]) -> None:
        del self._tasks[command.transfer_id, sent]
        error, error_kind, done = None, None, _Success()
        if task.cancelled():
            error = error_kind = "cancelled"
        elif (failure := task.exception()) is not None:
            error, error_kind = str(failure), "backend"
            if isinstance(failure, KVTransferError):
                error_kind = failure.kind
            elif isinstance(failure, StaleBlockError):
                error_kind = "stale"
            else:
                # A user's backend may raise anything; the scheduler needs a result to try the request again.
                logger.error("transfer %s failed in the backend", command.transfer_id, exc_info=failure)
                error = f"{type(failure).__name__}: {failure}"
        else:
            done = task.result()
        self._report(
            TransferResult(
                epoch=self._context.epoch,
                transfer_id=command.transfer_id,
                sent=sent,
                num_bytes=len(command.block_ids) * self._bytes_of(command) if error is None else 0,
                seconds=time.monotonic() - started_s - done.queued_s,
                queued_s=done.queued_s,
                error=error,
                error_kind=error_kind,
                checksums=None if done.checksums is None else [done.checksums],
            )
        )

    def _bytes_of(self, command: _BlockCommand) -> int:
        """Return the bytes of each block that a command moves."""
        if isinstance(command, FinishBlocks):
            return 0
        if isinstance(command, ReceiveBlocks):
            return self._kv_blocks.shape[1] // command.layers.count
        parts = self._parts.of_layers(command.layers)
        return sum(parts.part_bytes(route.source_part) for route in self._shard.outgoing(len(command.targets)))

    async def _send_all(self, command: SendBlocks) -> _Success:
        if not command.targets:
            raise KVTransferError("the receiver has not opened the link")
        routes = self._shard.outgoing(len(command.targets))
        sends = [self._send(command, command.targets[route.target], route) for route in routes]
        if not command.checksum:
            return _Success(max(await _gather_or_cancel(sends), default=0.0))
        parts = sorted({route.source_part for route in routes})
        # While the bytes move: nothing may write to the blocks, so the checksums are those of what is sent.
        summing = asyncio.create_task(asyncio.to_thread(self._checksums, command, parts))
        try:
            queued_s = await _gather_or_cancel(sends)
            checksums = await summing
        except BaseException:
            await cancel_and_wait([summing])
            raise
        return _Success(max(queued_s, default=0.0), checksums)

    async def _receive_all(self, command: ReceiveBlocks) -> _Success:
        routes = self._shard.incoming(len(command.sources))
        await _gather_or_cancel([self._receive(command, command.sources[route.source], route) for route in routes])
        return _Success()

    async def _finish_blocks(self, command: FinishBlocks) -> _Success:
        routes = self._shard.incoming(command.num_sources)
        num_parts = routes[0].target_part.count
        if self.one_sided and num_parts > 1:
            merging = asyncio.create_task(asyncio.to_thread(self._merge, command, num_parts))
            self._merging.add(merging)
            merging.add_done_callback(self._merging.discard)
            await wait_despite_cancel(merging)
        if command.checksums is not None:
            found = await asyncio.to_thread(self._checksums, command, [route.target_part for route in routes])
            self._compare(command, routes, found, command.checksums)
        return _Success()

    def _compare(self, command: FinishBlocks, routes: list[Route], found: list[int], expected: list[list[int]]) -> None:
        num_blocks = len(command.block_ids)
        wrong: set[int] = set()
        for index, route in enumerate(routes):
            received = found[index * num_blocks : (index + 1) * num_blocks]
            first = route.source_part.index * num_blocks
            sent = expected[route.source][first : first + num_blocks]
            wrong |= {block for block, (a, b) in enumerate(zip(received, sent, strict=True)) if a != b}
        if wrong:
            raise KVTransferError(f"{len(wrong)} of {num_blocks} blocks are not what was sent", "checksum")

    def _checksums(self, command: SendBlocks | FinishBlocks, parts: list[Part]) -> list[int]:
        blocks = self._parts.of_layers(command.layers)
        with self._transfer_stream():
            return [number for part in parts for number in blocks.checksums(command.block_ids, part)]

    def _merge(self, command: FinishBlocks, num_parts: int) -> None:
        with self._transfer_stream():
            self._parts.of_layers(command.layers).merge(command.block_ids, num_parts)

    def _rehearse_merge(self, num_parts: int) -> None:
        with self._transfer_stream():
            self._parts.rehearse_merge(num_parts)

    def _check_generations(self, command: _BlockCommand) -> None:
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

    # --- links -----------------------------------------------------------------------------------

    async def _open_link(self, command: OpenLink) -> None:
        context, error, endpoint = self._context, None, ""
        try:
            async with asyncio.timeout(context.timeout_s):
                routes = self._shard.incoming(len(command.sources))
                endpoint = await self._open_receive_window(self._sources_of(command), routes)
                num_parts = routes[0].target_part.count if routes else 1
                if self.one_sided and num_parts > 1:
                    await asyncio.to_thread(self._rehearse_merge, num_parts)
        except TimeoutError:
            error = f"kv_transfer: not ready for {command.source_id} within {context.timeout_s:g} s"
        except HBServeError as problem:
            error = str(problem)
        receiver = Peer(rank=context.rank, epoch=context.epoch, endpoint=endpoint, link_epoch=command.link_epoch)
        source_id, link_epoch = command.source_id, command.link_epoch
        self._report(
            LinkOpened(epoch=context.epoch, source_id=source_id, link_epoch=link_epoch, peers=[receiver], error=error)
        )

    async def _close_link(self, command: CloseLink, opening: asyncio.Task[None] | None) -> None:
        if opening is not None:  # else the link might open after it was closed
            await asyncio.wait([opening])
        await self._close_receive_window(self._sources_of(command), command.senders_done)
        if self._merging:
            await asyncio.wait(self._merging)
        self._report(LinkClosed(epoch=self._context.epoch, source_id=command.source_id, link_epoch=command.link_epoch))

    def _sources_of(self, command: OpenLink | CloseLink) -> list[Peer]:
        """Return the ranks that send to this rank on a link."""
        return [command.sources[route.source] for route in self._shard.incoming(len(command.sources))]


async def _gather_or_cancel(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all; if one fails or the caller is cancelled, cancel the others and wait for them."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancel_and_wait(tasks)
        raise


async def cancel_and_wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_despite_cancel(task: asyncio.Task[None]) -> None:
    """Wait for work that cannot be interrupted; a cancellation meanwhile takes effect after it."""
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await wait_until_done(task)
        raise

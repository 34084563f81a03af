"""Transfers between a rank's KV arena and the wire, whatever the backend."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hbserve.errors import ConfigError, HBServeError, KVTransferError, StaleBlockError
from hbserve.messages.transfer import (
    CancelTransfer,
    CloseLink,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferCommand,
    TransferReply,
    TransferResult,
    VerifyBlocks,
)
from hbserve.pd_disagg.kv_transfer.base import KVTransferContext
from hbserve.pd_disagg.kv_transfer.checksum import block_checksums
from hbserve.pd_disagg.kv_transfer.one_sided import ArenaSharing

logger = logging.getLogger(__name__)

_Order = SendBlocks | ReceiveBlocks | VerifyBlocks


class KVTransferManager(ABC):
    """Runs the transfers that the scheduler asks for; each side of one ends in exactly one `TransferResult`.

    Args:
        context: of the rank.
        kv_blocks: the arena as ``[block, byte]``, uint8.
        report: called with each reply, in the event loop.
        tp_rank: of this arena in its instance; the same rank of the other instance has the other end.
    """

    one_sided: bool
    """Whether the sender's result alone tells that the blocks are there."""

    def __init__(
        self,
        context: KVTransferContext,
        kv_blocks: torch.Tensor,
        report: Callable[[TransferReply], None],
        tp_rank: int = 0,
    ) -> None:
        self._context = context
        self._tp_rank = tp_rank
        self._kv_blocks = kv_blocks
        self._report = report
        self._tasks: dict[tuple[str, bool], asyncio.Task[_Done]] = {}
        self._link_tasks: set[asyncio.Task[None]] = set()
        # Of transfers whose command has not come yet, or whose result had left: bounded, so no need to tell which.
        self._cancelled_early: deque[str] = deque(maxlen=1024)
        self._seen_generation = torch.full((kv_blocks.shape[0],), -1, dtype=torch.int64)
        self._stream = torch.cuda.Stream(kv_blocks.device) if kv_blocks.is_cuda else None  # type: ignore[no-untyped-call]

    # --- for the event loop ----------------------------------------------------------------------

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """What peers are told of this rank at once; the rest they are told when a link opens."""

    @abstractmethod
    async def start(self) -> None:
        """Get ready; before anything else.

        Raises:
            HBServeError: if the backend cannot start.
        """

    def send(self, command: SendBlocks) -> None:
        """Start sending; the blocks' contents must be final."""
        self._start(command, True, self._send_and_sum(command, command.targets[self._tp_rank]))

    def handle(self, command: TransferCommand) -> None:
        """Start what the scheduler asks for."""
        if isinstance(command, ReceiveBlocks):
            self._start(command, False, self._receive(command, command.sources[self._tp_rank]))
        elif isinstance(command, VerifyBlocks):
            self._start(command, False, self._verify(command))
        elif isinstance(command, CancelTransfer):
            self.cancel(command.transfer_id)
        else:
            work = self._open_link(command) if isinstance(command, OpenLink) else self._close_link(command)
            task = asyncio.create_task(work)
            self._link_tasks.add(task)
            task.add_done_callback(self._link_tasks.discard)

    def cancel(self, transfer_id: str) -> None:
        """Give up on both sides of a transfer that are here, or will be; their results say so."""
        tasks = [task for sent in (True, False) if (task := self._tasks.get((transfer_id, sent))) is not None]
        for task in tasks:
            task.cancel()
        if not tasks:
            self._cancelled_early.append(transfer_id)

    async def cancel_all(self) -> None:
        """Give up on everything and wait until this side writes nothing more."""
        tasks = [*self._tasks.values(), *self._link_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._seen_generation.fill_(-1)

    @abstractmethod
    async def stop(self) -> None:
        """After `cancel_all`: let go of everything; the other side writes nothing more either."""

    # --- for the two kinds of backend --------------------------------------------------------------

    @abstractmethod
    async def _send(self, command: SendBlocks, target: Peer) -> float:
        """Move the blocks; returns the seconds that went to others."""

    @abstractmethod
    async def _receive(self, command: ReceiveBlocks, source: Peer) -> _Done:
        """Have the blocks moved here."""

    @abstractmethod
    async def _open_inbox(self, source: Peer) -> str:
        """Be ready for a link; what the sender needs to know."""

    @abstractmethod
    async def _close_inbox(self, source: Peer, sender_done: bool) -> None:
        """Return when nothing of the link is written any more."""

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

    # --- transfers -------------------------------------------------------------------------------

    def _start(self, command: _Order, sent: bool, transfer: Coroutine[None, None, _Done]) -> None:
        key = (command.transfer_id, sent)
        assert key not in self._tasks, f"transfer {command.transfer_id} is started twice"
        started = time.monotonic()
        task = self._tasks[key] = asyncio.create_task(self._within_limits(command, transfer))
        # A callback, not code at the coroutine's end: a task that is cancelled before it runs has no end.
        task.add_done_callback(lambda done: self._finish(command, sent, started, done))
        task.add_done_callback(lambda _: transfer.close())
        if command.transfer_id in self._cancelled_early:
            self._cancelled_early.remove(command.transfer_id)
            task.cancel()

    async def _within_limits(self, command: _Order, transfer: Coroutine[None, None, _Done]) -> _Done:
        self._refuse_stale(command)
        timeout_s = self._context.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await transfer
        except TimeoutError:
            raise KVTransferError(f"not complete within {timeout_s:g} s", "timeout") from None

    def _finish(self, command: _Order, sent: bool, started: float, task: asyncio.Task[_Done]) -> None:
        del self._tasks[command.transfer_id, sent]
        error, error_kind, done = None, None, _Done()
        if task.cancelled():
            error = error_kind = "cancelled"
        elif (failure := task.exception()) is not None:
            error, error_kind = str(failure), "backend"
            if isinstance(failure, KVTransferError):
                error_kind = failure.kind
            elif isinstance(failure, StaleBlockError):
                error_kind = "stale"
            else:
                # A user's backend may raise anything; the request must go on.
                logger.error("transfer %s failed in the backend", command.transfer_id, exc_info=failure)
                error = f"{type(failure).__name__}: {failure}"
        else:
            done = task.result()
        num_bytes = len(command.block_ids) * self._kv_blocks.shape[1]
        self._report(
            TransferResult(
                epoch=self._context.epoch,
                transfer_id=command.transfer_id,
                sent=sent,
                num_bytes=num_bytes if error is None else 0,
                seconds=time.monotonic() - started - done.queued_s,
                queued_s=done.queued_s,
                error=error,
                error_kind=error_kind,
                checksums=None if done.checksums is None else [done.checksums],
            )
        )

    async def _send_and_sum(self, command: SendBlocks, target: Peer) -> _Done:
        checksums = None
        if command.checksum:
            checksums = await asyncio.to_thread(self._checksums, command.block_ids)
        return _Done(await self._send(command, target), checksums)

    async def _verify(self, command: VerifyBlocks) -> _Done:
        found = await asyncio.to_thread(self._checksums, command.block_ids)
        wrong = sum(a != b for a, b in zip(found, command.checksums[self._tp_rank], strict=True))
        if wrong:
            raise KVTransferError(f"{wrong} of {len(found)} blocks are not what was sent", "checksum")
        return _Done()

    @torch.inference_mode()
    def _checksums(self, block_ids: list[int]) -> list[int]:
        with self._beside_the_steps():
            return block_checksums(self._kv_blocks, block_ids)

    def _refuse_stale(self, command: _Order) -> None:
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
                endpoint = await self._open_inbox(command.sources[self._tp_rank])
        except TimeoutError:
            error = f"kv_transfer: not ready for {command.source_id} within {context.timeout_s:g} s"
        except HBServeError as problem:
            error = str(problem)
        mine = Peer(rank=context.rank, epoch=context.epoch, endpoint=endpoint, link_epoch=command.link_epoch)
        self._report(
            LinkOpened(
                epoch=context.epoch,
                source_id=command.source_id,
                link_epoch=command.link_epoch,
                peers=[mine],
                error=error,
            )
        )

    async def _close_link(self, command: CloseLink) -> None:
        await self._close_inbox(command.sources[self._tp_rank], command.senders_done)
        self._report(LinkClosed(epoch=self._context.epoch, source_id=command.source_id, link_epoch=command.link_epoch))

    async def _cancel_and_wait(self, transfer_ids: set[str]) -> None:
        tasks = [self._tasks[name, False] for name in transfer_ids if (name, False) in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Done:
    """What is known of a side of a transfer that went well."""

    def __init__(self, queued_s: float = 0.0, checksums: list[int] | None = None) -> None:
        self.queued_s, self.checksums = queued_s, checksums


def make_manager(
    name: str,
    context: KVTransferContext,
    kv_blocks: torch.Tensor,
    report: Callable[[TransferReply], None],
    tp_rank: int = 0,
    sharing: ArenaSharing | None = None,
) -> KVTransferManager:
    """A manager with the backend that ``kv_transfer.backend`` names, not yet started.

    Args:
        sharing: for ``shm``.

    Raises:
        ConfigError: if it cannot be imported.
    """
    from hbserve.pd_disagg.kv_transfer.direct_transfers import DirectTransfers
    from hbserve.pd_disagg.kv_transfer.staged_transfers import StagedTransfers, make_backend

    if name == "mooncake":
        from hbserve.pd_disagg.kv_transfer.mooncake import MooncakeKVTransfer

        return DirectTransfers(MooncakeKVTransfer(context, kv_blocks), report, tp_rank)
    if name == "shm":
        from hbserve.pd_disagg.kv_transfer.shared_memory import SharedMemoryKVTransfer

        if sharing is None or sharing.handle is None:
            raise ConfigError("kv_transfer.backend: shm: this instance's KV arena cannot be shared")
        return DirectTransfers(SharedMemoryKVTransfer(context, kv_blocks, sharing), report, tp_rank)
    return StagedTransfers(make_backend(name, context), kv_blocks, report, tp_rank)

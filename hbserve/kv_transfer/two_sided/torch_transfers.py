"""KV transfer by torch.distributed: NCCL between two GPUs, gloo if a side has none or both share one.

There is no global process group. Each directed link between two ranks gets a group of two when it opens. The name of
the group holds both incarnations and the link's epoch. So a restarted instance or a broken link starts anew, and
nothing old can arrive on it. The two sides meet at the receiver's store, whose address the rank announces.

`TorchTransfers` runs in the event loop of a rank process; the two ends of a link (`torch_link`) run in threads.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hbserve.errors import KVTransferError, StartupError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.head_split import Route, Shard
from hbserve.kv_transfer.manager import KVTransferManager, Report
from hbserve.kv_transfer.send_queue import SendItem, SendQueue
from hbserve.kv_transfer.two_sided.buffers import KVLookupBuffer
from hbserve.kv_transfer.two_sided.torch_link import Header, PendingReceive, ReceivingLink, SendingLink, digest_of
from hbserve.messages.transfer import LinkKey, Peer, ReceiveBlocks, SendBlocks

dist: Any = torch.distributed  # its stubs lack the process groups, which are made directly here


class TorchTransfers(KVTransferManager):
    """The ``nccl`` backend of the configuration: both ends take part, each in one thread for every link.

    The thread does all the work of a transfer, from the arena to the wire or back. The event loop only starts and ends
    it.
    """

    one_sided = False

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor, report: Report, shard: Shard) -> None:
        super().__init__(context, kv_blocks, report, shard)
        self._outgoing: dict[LinkKey, tuple[SendingLink, SendQueue]] = {}
        self._incoming: dict[LinkKey, ReceivingLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._receive_tasks: dict[ReceivingLink, asyncio.Task[None]] = {}
        self._arrivals = KVLookupBuffer(context.buffer_size)
        self._store: Any = None
        self._device_uuid = ""
        if context.device.type == "cuda":
            self._device_uuid = str(torch.cuda.get_device_properties(context.device).uuid)

    @property
    def endpoint(self) -> str:
        """``host port device``: address of the store, and UUID of the GPU if there is one."""
        assert self._store is not None
        return f"{self._context.host} {self._store.port} {self._device_uuid}"

    async def start(self) -> None:
        """Open the store at which senders meet this rank.

        Raises:
            StartupError: if the address cannot be used.
        """
        context = self._context
        # TCPStore itself listens on every interface; with our listener it listens on the given one.
        listener = socket.socket()
        # A configured port may still have connections of the epoch before in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((context.host, context.port or 0))
        except OSError as error:
            raise StartupError(
                f"kv_transfer: cannot listen on {context.host}:{context.port or 'any port'}: {error.strerror}"
            ) from None
        listener.listen(64)
        port, timeout = listener.getsockname()[1], timedelta(seconds=context.timeout_s)
        self._store = dist.TCPStore(
            context.host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    async def cancel_all(self) -> None:
        await super().cancel_all()
        links = list(self._incoming.values())
        self._incoming.clear()
        await asyncio.gather(*(self._close_incoming(link) for link in links))
        for sending, queue in self._outgoing.values():
            self._abandon(sending, queue)
        self._outgoing.clear()
        await asyncio.gather(*self._closing)

    async def stop(self) -> None:
        self._store = None

    # --- sending ---------------------------------------------------------------------------------

    async def _send(self, command: SendBlocks, target: Peer, route: Route) -> float:
        link, queue = self._link_to(target, route)
        try:
            return await queue.put(SendItem(command))
        except BaseException:
            # This transfer failed, or was cancelled because another one failed: a link fails as a whole. Without the
            # abort, the link's kernels on the GPU would wait for the other side forever.
            self._abandon(link, queue)
            raise

    def _abandon(self, link: SendingLink, queue: SendQueue) -> None:
        queue.abandon()
        closing = asyncio.create_task(asyncio.to_thread(link.abort))  # an abort of NCCL takes a while
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _link_to(self, target: Peer, route: Route) -> tuple[SendingLink, SendQueue]:
        key = target.link_key
        if key not in self._outgoing:
            for older in [link for link in self._outgoing if link[0] == target.rank and link < key]:
                self._abandon(*self._outgoing.pop(older))
            sender = f"{self._context.rank}.{self._context.epoch}"
            name = f"{sender}-{target.rank}.{target.epoch}.{target.link_epoch}"
            uses_nccl, part = self._uses_nccl(target), route.source_part
            link = SendingLink(name, self._context, uses_nccl, target.endpoint, self._parts, part)
            batch_blocks = max(1, self._context.buffer_size // self._kv_blocks.shape[1])
            # A send to a stopped peer lasts until the time limit; it only reads the arena.
            self._outgoing[key] = link, SendQueue(link.send, batch_blocks, False, link.rendezvous, link.release)
        return self._outgoing[key]

    def _connect(self, target: Peer, route: Route) -> None:
        self._link_to(target, route)

    def _disconnect(self, target: Peer) -> None:
        if target.link_key in self._outgoing:
            self._abandon(*self._outgoing.pop(target.link_key))

    # --- receiving -------------------------------------------------------------------------------

    async def _receive(self, command: ReceiveBlocks, source: Peer, route: Route) -> None:
        link = self._link_from(source, route)
        digest = digest_of(command.transfer_id)
        name = f"{link.name} {digest}"
        pending = PendingReceive(command.block_ids, command.layers)
        if name in self._arrivals:
            buffer = self._arrivals.pop(name)
            await link.run(lambda: link.put(pending, buffer))
            return
        link.pending[digest] = pending
        try:
            if link not in self._receive_tasks:
                self._receive_tasks[link] = asyncio.create_task(self._receive_batches(link))
            await pending.arrived
        finally:
            link.pending.pop(digest, None)

    async def _receive_batches(self, link: ReceivingLink) -> None:
        """Receive batches while receives are pending on a link; keep what has not been asked for yet."""
        try:
            while link.pending:
                header = await link.run(link.receive)
                if header is not None:
                    await self._receive_unrequested(link, header)
        except KVTransferError as error:
            link.fail(error.bare())
        finally:
            # Not in a callback: a receive that starts before the callback runs would find the old task.
            self._receive_tasks.pop(link, None)

    async def _receive_unrequested(self, link: ReceivingLink, header: Header) -> None:
        reserved_bytes = sum(num_bytes for digest, num_bytes in header.chunks if digest not in link.pending)
        await self._arrivals.reserve(reserved_bytes)
        try:
            unrequested = await link.run(lambda: link.receive_chunks(header))
            for digest, buffer in unrequested.items():
                pending = link.pending.get(digest)
                if pending is None:
                    self._arrivals.put(f"{link.name} {digest}", buffer)
                    reserved_bytes -= buffer.nbytes
                    continue
                # It was asked for while it arrived.
                await link.run(functools.partial(link.put, pending, buffer))
                pending.settle(None)
        finally:
            self._arrivals.free(reserved_bytes)

    def _link_from(self, source: Peer, route: Route) -> ReceivingLink:
        key = source.link_key
        if key not in self._incoming:
            receiver = f"{self._context.rank}.{self._context.epoch}"
            name = f"{source.rank}.{source.epoch}-{receiver}.{source.link_epoch}"
            uses_nccl, part = self._uses_nccl(source), route.target_part
            self._incoming[key] = ReceivingLink(name, self._context, uses_nccl, self.endpoint, self._parts, part)
        return self._incoming[key]

    async def _open_receive_window(self, sources: list[Peer], routes: list[Route]) -> str:
        for source, route in zip(sources, routes, strict=True):
            self._link_from(source, route).start_rendezvous()
        return self.endpoint

    async def _close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        for source in sources:
            link = self._incoming.pop(source.link_key, None)
            if link is not None:
                await self._close_incoming(link)

    async def _close_incoming(self, link: ReceivingLink) -> None:
        """Return when nothing of a link is written any more."""
        await asyncio.to_thread(link.close)
        if (task := self._receive_tasks.pop(link, None)) is not None:
            task.cancel()
            await asyncio.wait([task])
        link.fail(KVTransferError(f"KV link {link.name} was closed"))
        self._arrivals.drop(f"{link.name} ")

    # --- both ------------------------------------------------------------------------------------

    def _uses_nccl(self, peer: Peer) -> bool:
        """Whether both sides have GPUs of their own: NCCL cannot join two processes on one; gloo uses host memory."""
        peer_uuid = peer.endpoint.split(" ")[2]
        return bool(self._device_uuid and peer_uuid and self._device_uuid != peer_uuid)

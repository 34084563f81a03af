"""KV transfer by torch.distributed: NCCL between two GPUs, gloo where a side has none.

There is no global process group. Each directed link between two instances gets a group of two when
it is first used, in a name space made of both incarnations and the link's epoch, so that a
restarted instance, or a link that broke, starts afresh and nothing old can arrive on it. The
receiver's store is where the two meet; its address is what the instance announces.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from hashlib import blake2b
from typing import Any, TypeVar

import torch
import torch.distributed

from hbserve.errors import KVTransferError, StartupError
from hbserve.messages.transfer import Peer
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.pd_disagg.kv_transfer.lookup_buffer import KVLookupBuffer

T = TypeVar("T")

dist: Any = torch.distributed  # its stubs lack the process groups, which are made directly here
_SENDER, _RECEIVER = 0, 1
_NCCL_POLL_S = 20e-6
_MAX_PARCELS = 64
_HEADER_WORDS = 1 + 2 * _MAX_PARCELS  # how many parcels, and for each its name's digest and its bytes


class _Parcel:
    """A buffer that waits to be sent."""

    def __init__(self, request_id: str, buffer: torch.Tensor) -> None:
        self.digest, self.buffer = _digest(request_id), buffer
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Link:
    """One direction between two instances: a group of two, used by one thread in order."""

    def __init__(self, name: str, rank: int, use_nccl: bool, context: KVTransferContext) -> None:
        self.name = name
        self._rank = rank
        self._use_nccl = use_nccl
        self._context = context
        self._timeout = timedelta(seconds=context.timeout_s)
        self._group: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kv-{name}")
        self.receiving = asyncio.Lock()
        self.outgoing: deque[_Parcel] = deque()
        self.sender: asyncio.Task[None] | None = None
        self.device = context.device if use_nccl else torch.device("cpu")
        self._stream: Any = torch.cuda.Stream(context.device) if use_nccl else None  # type: ignore[no-untyped-call]

    async def run(self, what: Callable[[], T]) -> T:
        """Call ``what`` in the link's thread.

        Raises:
            KVTransferError: with what torch reports.
        """
        task = asyncio.current_task()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, what)
        except asyncio.CancelledError:
            if task is not None and task.cancelling():
                raise
            raise KVTransferError(f"KV link {self.name} was closed") from None  # by `close`, before its turn came
        except RuntimeError as error:  # gloo, NCCL and the store all raise RuntimeError or a subclass
            raise KVTransferError(f"KV link {self.name}: {error}") from error

    def connect(self, store: Any) -> None:
        """Meet the other side. Blocks up to the timeout."""
        prefixed = dist.PrefixStore(self.name, store)
        if self._use_nccl:
            torch.cuda.set_device(self._context.device)
            nccl_options = dist.ProcessGroupNCCL.Options()
            nccl_options._timeout = self._timeout
            self._group = dist.ProcessGroupNCCL(prefixed, self._rank, 2, nccl_options)
        else:
            gloo_options = dist.ProcessGroupGloo._Options()
            gloo_options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._context.host)]
            gloo_options._timeout = self._timeout
            self._group = dist.ProcessGroupGloo(prefixed, self._rank, 2, gloo_options)

    def own_memory(self) -> AbstractContextManager[Any]:
        """Where buffers are allocated: memory of another stream may have a kernel pending that still uses it."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def connected(self) -> bool:
        return self._group is not None

    def send(self, tensors: list[torch.Tensor]) -> None:
        """Send one after the other; return when all are out."""
        group = self._group
        assert group is not None
        self._complete([functools.partial(group.send, [tensor], _RECEIVER, 0) for tensor in tensors])

    def receive(self, tensors: list[torch.Tensor]) -> None:
        """Likewise."""
        group = self._group
        assert group is not None
        self._complete([functools.partial(group.recv, [tensor], _SENDER, 0) for tensor in tensors])

    def _complete(self, starts: list[Callable[[], Any]]) -> None:
        if not self._use_nccl:
            for work in [start() for start in starts]:
                work.wait(self._timeout)
            return
        with torch.cuda.stream(self._stream):
            for start in starts:
                start().wait()  # orders the stream only; the event tells when the bytes are there
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        deadline = time.monotonic() + self._context.timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not complete within {self._context.timeout_s:g} s")
            time.sleep(_NCCL_POLL_S)

    def close(self) -> None:
        """Fail what is in flight and let the thread end; does not wait for it."""
        if self._group is not None and hasattr(self._group, "abort"):
            with contextlib.suppress(RuntimeError):
                self._group.abort()
        self._thread.shutdown(wait=False, cancel_futures=True)


class TorchDistributedKVTransfer(KVTransferBase):
    """The ``nccl`` backend of the configuration."""

    def __init__(self, context: KVTransferContext) -> None:
        super().__init__(context)
        self._links: dict[tuple[str, int], _Link] = {}
        self._arrivals = KVLookupBuffer(context.buffer_size)
        self._store: Any = None
        self._device_uuid = ""
        if context.device.type == "cuda":
            self._device_uuid = str(torch.cuda.get_device_properties(context.device).uuid)

    @property
    def endpoint(self) -> str:
        """``host port device``: where the store listens, and the GPU's UUID if there is one."""
        assert self._store is not None
        return f"{self.context.host} {self._store.port} {self._device_uuid}"

    async def start(self) -> None:
        """Open the store at which senders meet this instance.

        Raises:
            StartupError: if the address cannot be had.
        """
        # TCPStore itself listens on every interface; a listener of ours keeps it on the one we mean.
        listener = socket.socket()
        try:
            listener.bind((self.context.host, self.context.port or 0))
        except OSError as error:
            raise StartupError(
                f"kv_transfer: cannot listen on {self.context.host}:{self.context.port or 'any port'}: {error.strerror}"
            ) from None
        listener.listen(64)
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            self.context.host,
            port,
            None,
            True,
            timedelta(seconds=self.context.timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        link = self._link(_SENDER, self.peers[target_rank])
        parcel = _Parcel(request_id, kv_buffer)
        link.outgoing.append(parcel)
        if link.sender is None or link.sender.done():
            link.sender = asyncio.create_task(self._send_all(link, self.peers[target_rank].endpoint))
        try:
            await asyncio.shield(parcel.sent)
        except asyncio.CancelledError:
            if parcel in link.outgoing:
                link.outgoing.remove(parcel)
            raise

    async def _send_all(self, link: _Link, endpoint: str) -> None:
        """What has gathered while others were sent leaves together, under one header."""
        while link.outgoing:
            parcels = [link.outgoing.popleft() for _ in range(min(len(link.outgoing), _MAX_PARCELS))]
            try:
                await link.run(functools.partial(self._send_parcels, link, endpoint, parcels))
            except KVTransferError as error:
                for parcel in (*parcels, *link.outgoing):
                    parcel.sent.set_exception(error)
                    parcel.sent.exception()  # one whose transfer was cancelled has nobody to look at it
                link.outgoing.clear()
                return
            for parcel in parcels:
                parcel.sent.set_result(None)

    def _send_parcels(self, link: _Link, endpoint: str, parcels: list[_Parcel]) -> None:
        if not link.connected:
            link.connect(self._connection_to(endpoint))
        words = [len(parcels), *(word for parcel in parcels for word in (parcel.digest, parcel.buffer.nbytes))]
        words += [0] * (_HEADER_WORDS - len(words))
        with link.own_memory():
            header = torch.tensor(words, dtype=torch.int64, device=link.device)
            buffers = [parcel.buffer.to(link.device) for parcel in parcels]
        link.send([header, *buffers])

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        peer = self.peers[source_rank]
        link = self._link(_RECEIVER, peer)
        wanted = f"{link.name} {_digest(request_id)}"
        # Whoever holds the lock files what arrives next, its own or another's, until its own is there.
        async with link.receiving:
            while wanted not in self._arrivals:
                await self._receive_next(link)
        return await self._arrivals.take(wanted)

    async def _receive_next(self, link: _Link) -> None:
        def receive_header() -> list[int]:
            if not link.connected:
                # Not over `_store` itself: a link whose sender does not come would hold up all others there.
                link.connect(self._connection_to(self.endpoint))
            with link.own_memory():
                header = torch.empty(_HEADER_WORDS, dtype=torch.int64, device=link.device)
                link.receive([header])
                words: list[int] = header.tolist()
            return words

        def receive_buffers(sizes: list[int]) -> list[torch.Tensor]:
            with link.own_memory():
                buffers = [torch.empty(size, dtype=torch.uint8, device=link.device) for size in sizes]
            link.receive(buffers)
            return buffers

        count, *words = await link.run(receive_header)
        digests, sizes = words[0 : 2 * count : 2], words[1 : 2 * count : 2]
        await self._arrivals.wait_for_space(sum(sizes))
        try:
            buffers = await link.run(lambda: receive_buffers(sizes))
        except BaseException:
            await self._arrivals.give_back(sum(sizes))
            raise
        for digest, buffer in zip(digests, buffers, strict=True):
            self._arrivals.put(f"{link.name} {digest}", buffer)

    def _connection_to(self, endpoint: str) -> Any:
        """A connection of one link's own to the store at an endpoint."""
        host, port, _ = endpoint.split(" ")
        timeout = timedelta(seconds=self.context.timeout_s)
        return dist.TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)

    def _link(self, role: int, peer: Peer) -> _Link:
        mine, theirs = f"{self.context.rank}.{self.context.epoch}", f"{peer.rank}.{peer.epoch}"
        name = f"{mine}-{theirs}.{peer.link_epoch}" if role == _SENDER else f"{theirs}-{mine}.{peer.link_epoch}"
        current = self._links.get((name, role))
        if current is not None:
            return current
        for key, link in list(self._links.items()):
            outdated = key[1] == role and _same_route(link.name, name)
            if outdated:
                del self._links[key]
                link.close()
        their_uuid = peer.endpoint.split(" ")[2]
        # NCCL cannot join two processes on one card; gloo then goes through host memory.
        use_nccl = bool(self._device_uuid and their_uuid and self._device_uuid != their_uuid)
        self._links[name, role] = _Link(name, role, use_nccl, self.context)
        return self._links[name, role]

    async def stop(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._store = None


def _digest(request_id: str) -> int:
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little", signed=True)


def _same_route(name: str, other: str) -> bool:
    """Whether two link names join the same ranks in the same direction, in whatever epochs."""

    def ranks(link_name: str) -> list[str]:
        return [end.split(".")[0] for end in link_name.split("-")]

    return ranks(name) == ranks(other)

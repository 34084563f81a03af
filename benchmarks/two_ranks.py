"""Two ranks in two processes of this host, with a link between them.

The sender is this process, the receiver a child of it. Both run what an instance's rank runs: a
`KVTransferManager` with its backend, commanded by the messages that a scheduler would send.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from benchmarks.raw_links import raw_link
from hbserve.errors import KVTransferError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.manager import KVTransferManager
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.messages.transfer import (
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferCommand,
    TransferReply,
    TransferResult,
)
from hbserve.platform import make_platform

_TIMEOUT_S = 60.0
_SETTINGS_VARIABLE = "HBSERVE_BENCH_TRANSFER"


@dataclass(frozen=True)
class TransferOptions:
    """Options of the measurement.

    Attributes:
        backend: value of ``kv_transfer.backend``.
        protocol: value of ``kv_transfer.mooncake_protocol``.
        device: ``cpu`` or ``cuda``; with ``cuda`` the sender is on GPU 0 and the receiver on GPU 1.
        block_bytes: size of a KV block.
        transfer_blocks: blocks of one transfer; one line of the table for each number.
        total_bytes: bytes that each run moves.
        scatter: no two blocks of a transfer are neighbours.
        repeats: runs for each line; the median is shown.
        json: file for the results; None: none.
    """

    backend: str
    protocol: str | None
    device: Literal["cpu", "cuda"]
    block_bytes: int
    transfer_blocks: tuple[int, ...]
    total_bytes: int
    scatter: bool
    repeats: int
    json: Path | None


class _Receives(msgspec.Struct, tag=True, array_like=True):
    """Address of the receiver, to the sender."""

    peer: Peer
    one_sided: bool


class _RawEndpoint(msgspec.Struct, tag=True, array_like=True):
    """Endpoint of the raw link, to the sender."""

    endpoint: str


class _Raw(msgspec.Struct, tag=True, array_like=True):
    """Order to the receiver: take part in ``count`` raw transfers of ``num_bytes``."""

    endpoint: str
    num_bytes: int
    count: int


_ToReceiver = TransferCommand | _Raw
_ToSender = TransferReply | _Receives | _RawEndpoint


class Sender:
    """The sender, in this process. It does what a scheduler and a sending rank do for one link."""

    def __init__(self, options: TransferOptions, child: Connection) -> None:
        self._options = options
        self._child = child
        self._decoder = msgspec.msgpack.Decoder(_ToSender)
        self._replies: asyncio.Queue[Any] = asyncio.Queue()
        self._unread: list[Any] = []
        self._count = 0
        rank = _make_rank(options, 0, self._replies.put_nowait)
        self._num_blocks, self._manager = len(rank.arena), rank.manager
        self._raw = raw_link(options.backend, rank.arena, rank.sharing)

    async def connect(self) -> None:
        """Open a link to the receiver."""
        loop = asyncio.get_running_loop()
        await self._manager.start()
        loop.add_reader(self._child.fileno(), self._on_readable)
        me = Peer(rank=0, epoch=1, endpoint=self._manager.endpoint, link_epoch=1)
        receives = await self._next(_Receives)
        self._one_sided = receives.one_sided
        self._me = me
        self._tell(OpenLink(source_id="bench", link_epoch=1, sources=[me]))
        opened = await self._next(LinkOpened)
        if opened.error is not None:
            raise KVTransferError(opened.error)
        self._target = opened.peers[0]
        self._raw_endpoint = (await self._next(_RawEndpoint)).endpoint

    async def move(self, num_blocks: int, count: int) -> float:
        """Ask for ``count`` transfers at once; return the seconds until the last has arrived."""
        tables = [self._blocks(index, num_blocks) for index in range(count)]
        started = time.perf_counter()
        for blocks in tables:
            self._count += 1
            name = str(self._count)
            generations = [0] * num_blocks
            if not self._one_sided:
                self._tell(
                    ReceiveBlocks(
                        transfer_id=name, request_id=name, sources=[self._me], block_ids=blocks, generations=generations
                    )
                )
            self._manager.send(
                SendBlocks(
                    transfer_id=name,
                    request_id=name,
                    targets=[self._target],
                    block_ids=blocks,
                    generations=generations,
                    target_block_ids=blocks,
                )
            )
        for _ in range(count if self._one_sided else 2 * count):
            result = await self._next(TransferResult)
            if result.error is not None:
                raise KVTransferError(result.error)
        return time.perf_counter() - started

    async def move_raw(self, num_bytes: int, count: int) -> float:
        """Move as many bytes with the library alone, one transfer after the other; return the seconds."""
        self._tell(_Raw(endpoint=self._raw_endpoint, num_bytes=num_bytes, count=count))
        return await asyncio.to_thread(self._raw.send, self._raw_endpoint, num_bytes, count)

    def _blocks(self, index: int, num_blocks: int) -> list[int]:
        total = self._num_blocks
        if not self._options.scatter:
            first = index * num_blocks % (total - num_blocks + 1)
            return list(range(first, first + num_blocks))
        return [2 * ((index * num_blocks + block) % (total // 2)) for block in range(num_blocks)]

    def _tell(self, message: msgspec.Struct) -> None:
        self._child.send_bytes(msgspec.msgpack.encode(message))

    def _on_readable(self) -> None:
        try:
            self._replies.put_nowait(self._decoder.decode(self._child.recv_bytes()))
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._child.fileno())
            self._replies.put_nowait(KVTransferError("the receiver ended; its error is above"))

    async def _next(self, kind: type[Any]) -> Any:
        while True:
            for reply in self._unread:
                if isinstance(reply, kind):
                    self._unread.remove(reply)
                    return reply
            reply = await asyncio.wait_for(self._replies.get(), _TIMEOUT_S)
            if isinstance(reply, Exception):
                raise reply
            self._unread.append(reply)

    async def close(self) -> None:
        """Cancel the open transfers."""
        asyncio.get_running_loop().remove_reader(self._child.fileno())
        await self._manager.cancel_all()


@asynccontextmanager
async def two_ranks(options: TransferOptions) -> AsyncIterator[Sender]:
    """Start the receiver and connect; yield the sender; end both."""
    parent, child_fd = _socket_pair()
    settings = json.dumps(asdict(options) | {"json": None, "fd": child_fd})
    child = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, "-m", "benchmarks.two_ranks"],
        env=os.environ | {_SETTINGS_VARIABLE: settings},
        pass_fds=[child_fd],
    )
    os.close(child_fd)
    sender = Sender(options, parent)
    try:
        await sender.connect()
        yield sender
    finally:
        await sender.close()
        parent.close()  # the receiver ends when it notices that
        try:
            await asyncio.to_thread(child.wait, 10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _socket_pair() -> tuple[Connection, int]:
    parent, child = socket.socketpair()
    return Connection(parent.detach()), child.detach()


class _Rank(NamedTuple):
    """One end of the link."""

    arena: torch.Tensor
    sharing: ArenaSharing
    manager: KVTransferManager


def _make_rank(options: TransferOptions, rank: int, report: Any) -> _Rank:
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", rank)
    longest = max(options.transfer_blocks)
    num_blocks = max(options.total_bytes // options.block_bytes, longest) * (2 if options.scatter else 1)
    platform = make_platform(options.device, rank, 1, 2)
    platform.activate()
    shared = platform.allocate_shared_arena(num_blocks * options.block_bytes)
    arena = shared.tensor.view(num_blocks, options.block_bytes).fill_(rank)
    sharing = ArenaSharing(shared.handle, platform.open_arena)
    context = KVTransferContext(
        rank=rank,
        epoch=1,
        host="127.0.0.1",
        port=None,
        device=device,
        timeout_s=_TIMEOUT_S,
        buffer_size=1 << 30,
        mooncake_protocol=options.protocol,
    )
    return _Rank(arena, sharing, make_manager(options.backend, context, arena, report, sharing=sharing))


async def _receive(options: TransferOptions, parent: Connection) -> None:
    """Run the receiver until the sender has ended."""
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[Any] = asyncio.Queue()
    decoder = msgspec.msgpack.Decoder(_ToReceiver)

    def tell(message: msgspec.Struct) -> None:
        parent.send_bytes(msgspec.msgpack.encode(message))

    def on_readable() -> None:
        try:
            commands.put_nowait(decoder.decode(parent.recv_bytes()))
        except (EOFError, OSError):
            loop.remove_reader(parent.fileno())
            commands.put_nowait(None)

    arena, sharing, manager = _make_rank(options, 1, tell)
    await manager.start()
    tell(_Receives(Peer(rank=1, epoch=1, endpoint=manager.endpoint), manager.one_sided))
    loop.add_reader(parent.fileno(), on_readable)
    raw = raw_link(options.backend, arena, sharing)
    while (command := await commands.get()) is not None:
        if isinstance(command, _Raw):
            await asyncio.to_thread(raw.receive, command.endpoint, command.num_bytes, command.count)
            continue
        manager.handle(command)
        if isinstance(command, OpenLink):
            tell(_RawEndpoint(await asyncio.to_thread(raw.listen)))
    await manager.cancel_all()


def main() -> None:
    """Entry of the receiver's process."""
    settings = json.loads(os.environ[_SETTINGS_VARIABLE])
    descriptor = settings.pop("fd")
    options = TransferOptions(**settings)
    asyncio.run(_receive(options, Connection(descriptor)))
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may wait for a peer that has ended


if __name__ == "__main__":
    main()

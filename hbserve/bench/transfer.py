"""How fast KV moves between two processes of this host, and how fast the library under it could.

(With ``--model`` the command measures whole systems instead, see `hbserve.bench.handover`.)

The sender is this process, the receiver a child of it. Both run what an instance's rank runs: a
`KVTransferManager` with its backend, commanded by the messages that a scheduler would send. Beside it
stands the library's own rate, measured in the same run between the same two processes: the same
number of bytes for each transfer, in one piece, one after the other, without anything of ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
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

from hbserve.bench import handover
from hbserve.bench.raw_links import raw_link
from hbserve.errors import ConfigError, KVTransferError
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
from hbserve.pd_disagg.kv_transfer.base import KVTransferContext
from hbserve.pd_disagg.kv_transfer.manager import KVTransferManager, make_manager
from hbserve.pd_disagg.kv_transfer.one_sided import ArenaSharing
from hbserve.platform import make_platform

_TIMEOUT_S = 60.0
_SETTINGS_VARIABLE = "HBSERVE_BENCH_TRANSFER"


@dataclass(frozen=True)
class TransferOptions:
    """What to measure.

    Attributes:
        backend: as ``kv_transfer.backend``.
        protocol: as ``kv_transfer.mooncake_protocol``.
        device: ``cpu`` or ``cuda``: then the sender is on GPU 0 and the receiver on GPU 1.
        block_bytes: of one KV block.
        transfer_blocks: how many of them one transfer has; one line of the table for each number.
        total_bytes: moved in each run.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `options_from`."""
    parser.add_argument(
        "--backend",
        default="nccl",
        help="nccl (default; gloo on the CPU), shm or mooncake; with --model several, comma-separated",
    )
    parser.add_argument("--protocol", choices=["tcp", "rdma", "nvlink"], help="how Mooncake moves bytes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda: from GPU 0 to GPU 1")
    parser.add_argument(
        "--block-bytes",
        type=int,
        default=147456 * 16,
        help="of a KV block (default: 16 tokens of Qwen3-8B)",
    )
    parser.add_argument(
        "--transfer-blocks",
        default="1,8,32,128",
        help="blocks of one transfer, one line each (default: 1,8,32,128; 32 are a prompt chunk of 512 tokens)",
    )
    parser.add_argument("--total-mib", type=int, default=1024, help="moved in each run (default: 1024)")
    parser.add_argument("--scatter", action="store_true", help="no two blocks of a transfer are neighbours")
    parser.add_argument("--repeats", type=int, default=3, help="runs for each line (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    handover.add_arguments(parser)


def options_from(arguments: argparse.Namespace) -> TransferOptions:
    """From what `add_arguments` has declared.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    sizes = arguments.transfer_blocks.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--transfer-blocks: {arguments.transfer_blocks!r} is not a list of positive numbers")
    for name in ("block_bytes", "total_mib", "repeats"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be positive")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    return TransferOptions(
        backend=arguments.backend,
        protocol=arguments.protocol,
        device=device,
        block_bytes=arguments.block_bytes,
        transfer_blocks=tuple(int(size) for size in sizes),
        total_bytes=arguments.total_mib << 20,
        scatter=arguments.scatter,
        repeats=arguments.repeats,
        json=arguments.json,
    )


class _Receives(msgspec.Struct, tag=True, array_like=True):
    """From the receiver: its address."""

    peer: Peer
    one_sided: bool


class _RawEndpoint(msgspec.Struct, tag=True, array_like=True):
    """Between the two: where the library's own rate is measured."""

    endpoint: str


class _Raw(msgspec.Struct, tag=True, array_like=True):
    """To the receiver: take part in that, so many times so many bytes."""

    endpoint: str
    num_bytes: int
    count: int


_ToReceiver = TransferCommand | _Raw
_ToSender = TransferReply | _Receives | _RawEndpoint


def run(options: TransferOptions) -> None:
    """Measure, print a table and write the JSON file.

    Raises:
        HBServeError: if the backend cannot be used here.
    """
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        raise ConfigError("--device cuda: needs two GPUs")
    lines = asyncio.run(_measure(options))
    if options.json is not None:
        document = {"benchmark": "transfer", "options": asdict(options) | {"json": None}, "lines": lines}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


async def _measure(options: TransferOptions) -> list[dict[str, Any]]:
    lines = []
    async with _two_ranks(options) as link:
        how = "scattered" if options.scatter else "neighbouring"
        print(f"{options.backend} on {options.device}, blocks of {options.block_bytes} bytes, {how}")
        print(f"{'transfer':>12} {'one':>10} {'stream':>12} {'library':>12} {'share':>7}")
        for num_blocks in options.transfer_blocks:
            count = max(1, options.total_bytes // (num_blocks * options.block_bytes))
            await link.move(num_blocks, min(count, 8))  # connects, and touches the memory
            one_s = statistics.median([await link.move(num_blocks, 1) for _ in range(max(3, options.repeats))])
            stream_s = statistics.median([await link.move(num_blocks, count) for _ in range(options.repeats)])
            num_bytes = num_blocks * options.block_bytes
            raw_s = statistics.median([await link.move_raw(num_bytes, count) for _ in range(options.repeats)])
            line = {
                "transfer_bytes": num_bytes,
                "count": count,
                "one_transfer_s": one_s,
                "gb_per_s": num_bytes * count / stream_s / 1e9,
                "library_gb_per_s": num_bytes * count / raw_s / 1e9,
            }
            lines.append(line)
            print(
                f"{num_bytes / (1 << 20):8.2f} MiB {one_s * 1e3:7.2f} ms {line['gb_per_s']:7.2f} GB/s "
                f"{line['library_gb_per_s']:7.2f} GB/s {raw_s / stream_s:7.0%}",
                flush=True,
            )
    return lines


class _Sender:
    """This process' end: what a scheduler and a sending rank do, as far as one link needs it."""

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
        """So many transfers, all asked for at once; seconds until the last has arrived."""
        tables = [self._blocks(index, num_blocks) for index in range(count)]
        started = time.perf_counter()
        for blocks in tables:
            self._count += 1
            name = str(self._count)
            generations = [0] * num_blocks
            if not self._one_sided:
                self._tell(
                    ReceiveBlocks(
                        transfer_id=name,
                        request_id=name,
                        sources=[self._me],
                        block_ids=blocks,
                        generations=generations,
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
        """The same with the library alone, one after the other; seconds."""
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
        """Give up on what is under way."""
        asyncio.get_running_loop().remove_reader(self._child.fileno())
        await self._manager.cancel_all()


@asynccontextmanager
async def _two_ranks(options: TransferOptions) -> AsyncIterator[_Sender]:
    ours, theirs = _socket_pair()
    settings = json.dumps(asdict(options) | {"json": None, "fd": theirs})
    child = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, "-m", "hbserve.bench.transfer"],
        env=os.environ | {_SETTINGS_VARIABLE: settings},
        pass_fds=[theirs],
    )
    os.close(theirs)
    sender = _Sender(options, ours)
    try:
        await sender.connect()
        yield sender
    finally:
        await sender.close()
        ours.close()  # the receiver ends when it sees that
        try:
            await asyncio.to_thread(child.wait, 10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _socket_pair() -> tuple[Connection, int]:
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs.detach()


class _Rank(NamedTuple):
    """What one end has."""

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
    """The receiver's life, until the sender is gone."""
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
    os._exit(0)  # libraries' threads may wait for a peer that is gone


if __name__ == "__main__":
    main()

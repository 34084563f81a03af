"""KV transfer between two arenas over real sockets: right bytes, right matching, no late writes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.errors import ConfigError, KVTransferError, StartupError
from hbserve.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.kv_transfer.head_split import Shard, routes
from hbserve.kv_transfer.one_sided.base import ArenaSharing, coalesce
from hbserve.kv_transfer.one_sided.mooncake import CONFIG_PATH_VARIABLE, MooncakeSettings
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.kv_transfer.two_sided.buffers import KVLookupBuffer
from hbserve.kv_transfer.two_sided.staged_transfers import make_backend
from hbserve.messages.transfer import (
    ALL_LAYERS,
    CloseLink,
    DisconnectLink,
    FinishBlocks,
    LayerGroup,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
)
from hbserve.platform.cpu import CpuPlatform
from hbserve.platform.remote_arena import RemoteArena
from tests.support.engines import needs_mooncake
from tests.support.ports import free_ports

NUM_BLOCKS, ROWS, HEAD_BYTES = 32, 8, 128
BLOCK_BYTES = ROWS * HEAD_BYTES
ONLY_RANK = Shard(num_rows=ROWS)
DEADLINE_S = 30.0
ONE_SIDED = ["shm", pytest.param("mooncake", marks=needs_mooncake)]


class Side:
    """One instance's end: an arena, a backend and a manager, and the results it reported."""

    def __init__(self, rank: int, timeout_s: float, buffer_size: int, backend: str, shard: Shard = ONLY_RANK) -> None:
        self.context = KVTransferContext(
            rank=rank,
            epoch=100 + rank,
            host="127.0.0.1",
            port=None,
            device=torch.device("cpu"),
            timeout_s=timeout_s,
            buffer_size=buffer_size,
        )
        generator = torch.Generator().manual_seed(rank)
        self.platform = CpuPlatform(1)
        block_bytes = ROWS * HEAD_BYTES * max(1, shard.num_kv_heads // shard.size)
        shared = self.platform.allocate_shared_arena(NUM_BLOCKS * block_bytes)
        self.arena = shared.tensor.view(NUM_BLOCKS, block_bytes)
        self.arena.random_(0, 256, generator=generator)
        self.results: asyncio.Queue[Any] = asyncio.Queue()
        self.opened: list[RemoteArena] = []
        self.manager = make_manager(
            backend,
            self.context,
            self.arena,
            self.results.put_nowait,
            shard,
            sharing=ArenaSharing(shared.handle, self._open_arena),
        )

    def _open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        self.opened.append(self.platform.open_arena(handle, num_bytes))
        return self.opened[-1]

    def peer(self, link_epoch: int = 0) -> Peer:
        return Peer(
            rank=self.context.rank, epoch=self.context.epoch, endpoint=self.manager.endpoint, link_epoch=link_epoch
        )

    async def let_write(self, source: Side, link_epoch: int = 0) -> Peer:
        """Open a link from another side to here; this side as that one shall address it."""
        sources = [source.peer(link_epoch)]
        self.manager.handle(OpenLink(source_id="source", link_epoch=link_epoch, sources=sources))
        opened = await self.result()
        assert isinstance(opened, LinkOpened)
        assert opened.error is None
        return opened.peers[0]

    async def close(self, source: Peer, senders_done: bool = True) -> None:
        """Close that link."""
        self.manager.handle(
            CloseLink(source_id="source", link_epoch=source.link_epoch, sources=[source], senders_done=senders_done)
        )
        assert isinstance(await self.result(), LinkClosed)

    async def result(self) -> Any:
        return await asyncio.wait_for(self.results.get(), DEADLINE_S)


@asynccontextmanager
async def sides(
    count: int = 2, timeout_s: float = 20.0, buffer_size: int = 1 << 20, backend: str = "nccl"
) -> AsyncIterator[list[Side]]:
    made = [Side(rank, timeout_s, buffer_size, backend) for rank in range(count)]
    for side in made:
        await side.manager.start()
    try:
        yield made
    finally:
        for side in made:
            await side.manager.cancel_all()
            await side.manager.stop()


def pair(
    name: str, source: Side, target: Side, blocks: list[int], to: list[int], generation: int = 0, link_epoch: int = 0
) -> tuple[SendBlocks, ReceiveBlocks]:
    generations = [generation] * len(blocks)
    send = SendBlocks(
        transfer_id=name,
        request_id=name,
        targets=[target.peer(link_epoch)],
        block_ids=blocks,
        generations=generations,
        target_block_ids=to,
    )
    receive = ReceiveBlocks(
        transfer_id=name, request_id=name, sources=[source.peer(link_epoch)], block_ids=to, generations=generations
    )
    return send, receive


async def test_blocks_arrive_where_they_belong_and_nowhere_else() -> None:
    async with sides() as (source, target):
        before = target.arena.clone()
        send, receive = pair("t", source, target, [3, 9, 4], [20, 1, 7])
        target.manager.handle(receive)
        source.manager.send(send)
        for side in (source, target):
            result = await side.result()
            assert result.error is None
            assert result.num_bytes == 3 * BLOCK_BYTES
        assert torch.equal(target.arena[[20, 1, 7]], source.arena[[3, 9, 4]])
        others = [block for block in range(NUM_BLOCKS) if block not in (20, 1, 7)]
        assert torch.equal(target.arena[others], before[others])


async def test_arrivals_in_another_order_than_asked_for_are_matched() -> None:
    async with sides() as (source, target):
        commands = [pair(f"t{i}", source, target, [i], [31 - i]) for i in range(8)]
        for _, receive in reversed(commands):
            target.manager.handle(receive)
        for send, _ in commands:
            source.manager.send(send)
        for _ in commands:
            assert (await source.result()).error is None
            assert (await target.result()).error is None
        assert torch.equal(target.arena[[31 - i for i in range(8)]], source.arena[list(range(8))])


async def test_what_is_asked_for_in_the_moment_in_which_all_else_has_come_is_received() -> None:
    async with sides(timeout_s=2.0) as (source, target):
        await target.let_write(source)
        for index in range(400):
            send, receive = pair(f"t{index}", source, target, [1], [3])
            for _ in range(index % 8):
                await asyncio.sleep(0)
            target.manager.handle(receive)
            source.manager.send(send)
            assert [(await side.result()).error for side in (source, target)] == [None, None]


async def test_what_nobody_asks_for_any_more_takes_no_room_when_its_link_has_ended() -> None:
    async with sides(buffer_size=2 * BLOCK_BYTES) as (source, target):
        for epoch in range(1, 4):  # a leak of one of them would hold up the next
            sends, receives = zip(
                *(pair(f"{name}{epoch}", source, target, [1, 2], [3, 4], 0, epoch) for name in "ab"), strict=True
            )
            for send in sends:
                source.manager.send(send)
            target.manager.handle(receives[1])
            assert (await target.result()).error is None
            await target.close(source.peer(epoch))
            for _ in sends:
                assert (await source.result()).error is None


async def test_a_port_that_was_given_can_be_had_again_at_once() -> None:
    (port,) = free_ports(1)
    context = KVTransferContext(0, 1, "127.0.0.1", port, torch.device("cpu"), 5.0, 1 << 20)
    for _ in range(2):
        manager = make_manager("nccl", context, torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), print)
        await manager.start()
        with socket.create_connection(("127.0.0.1", port)):  # what is there when an instance starts again
            await asyncio.sleep(0.1)
            await manager.stop()


async def test_several_senders_and_receivers_at_once() -> None:
    async with sides(4) as made:
        links = [(s, t) for s in made[:2] for t in made[2:]]
        for index, (source, target) in enumerate(links):
            send, receive = pair(f"t{index}", source, target, [index], [index])
            source.manager.send(send)
            target.manager.handle(receive)
        for _, target in links:
            assert (await target.result()).error is None
        for index, (source, target) in enumerate(links):
            assert torch.equal(target.arena[index], source.arena[index])


async def test_a_buffer_smaller_than_a_transfer_slows_but_does_not_stop_it() -> None:
    async with sides(buffer_size=BLOCK_BYTES) as (source, target):
        for i in range(4):
            send, receive = pair(f"t{i}", source, target, [i, i + 8], [i, i + 8])
            target.manager.handle(receive)
            source.manager.send(send)
        for _ in range(4):
            assert (await target.result()).error is None
        assert torch.equal(target.arena[:4], source.arena[:4])


async def test_a_missing_sender_is_a_failure_at_the_timeout_and_writes_nothing() -> None:
    async with sides(timeout_s=1.0) as (source, target):
        before = target.arena.clone()
        _, receive = pair("lonely", source, target, [1], [2])
        target.manager.handle(receive)
        result = await target.result()
        assert result.error is not None
        assert torch.equal(target.arena, before)
        # The link starts afresh under the next epoch.
        send, receive = pair("again", source, target, [1], [2], link_epoch=1)
        target.manager.handle(receive)
        source.manager.send(send)
        assert (await target.result()).error is None
        assert torch.equal(target.arena[2], source.arena[1])


async def test_a_sender_that_does_not_come_holds_up_no_other() -> None:
    async with sides(3, timeout_s=20.0) as (absent, source, target):
        _, lonely = pair("lonely", absent, target, [1], [2])
        target.manager.handle(lonely)
        await asyncio.sleep(0.3)  # by now it waits for the other end of its link
        send, receive = pair("t", source, target, [3], [4])
        target.manager.handle(receive)
        source.manager.send(send)
        async with asyncio.timeout(10):
            result = await target.result()
        assert (result.transfer_id, result.error) == ("t", None)


async def test_a_cancelled_transfer_reports_and_never_writes() -> None:
    async with sides() as (source, target):
        before = target.arena.clone()
        send, receive = pair("t", source, target, [1], [2])
        target.manager.handle(receive)
        await asyncio.sleep(0)
        target.manager.cancel("t")
        result = await target.result()
        assert result.error == "cancelled"
        source.manager.send(send)
        await asyncio.sleep(0.3)  # the bytes may even arrive; they must not be written
        assert torch.equal(target.arena, before)
        source.manager.cancel("t")
        await source.result()


async def test_a_stale_block_is_refused() -> None:
    async with sides() as (source, target):
        send, receive = pair("new", source, target, [1], [2], generation=5)
        target.manager.handle(receive)
        source.manager.send(send)
        assert (await target.result()).error is None
        _, stale = pair("old", source, target, [1], [2], generation=4)
        target.manager.handle(stale)
        result = await target.result()
        assert result.error is not None
        assert "reused" in result.error


async def test_checksums_tell_blocks_that_are_not_what_was_sent() -> None:
    async with sides() as (source, target):
        send, receive = pair("t", source, target, [3, 9, 4], [20, 1, 7])
        target.manager.handle(receive)
        source.manager.send(msgspec.structs.replace(send, checksum=True))
        assert (await target.result()).error is None
        sent = await source.result()
        for damage, name in ((0, "whole"), (64, "damaged")):
            target.arena[1, 500] ^= damage
            target.manager.handle(
                FinishBlocks(
                    transfer_id=name,
                    num_sources=1,
                    block_ids=[20, 1, 7],
                    generations=[0, 0, 0],
                    checksums=sent.checksums,
                )
            )
            result = await target.result()
            assert result.error_kind == ("checksum" if damage else None)
    assert "1 of 3 blocks" in result.error


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 12))
def test_runs_move_the_same_blocks_and_none_could_be_joined(source: list[int], target: list[int], count: int) -> None:
    runs = coalesce(zip((8 * block for block in source[:count]), (8 * block for block in target), strict=False), 8)
    moved = [(here + byte, there + byte) for here, there, length in runs for byte in range(0, length, 8)]
    assert sorted(moved) == sorted((8 * a, 8 * b) for a, b in zip(source[:count], target[:count], strict=True))
    ends = {(here + length, there + length) for here, there, length in runs}
    assert not ends & {(here, there) for here, there, _ in runs}


# --- one-sided backends --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ONE_SIDED)
async def test_one_sided_writes_arrive_where_they_belong_and_nowhere_else(backend: str) -> None:
    async with sides(3, backend=backend) as (source, other, target):
        before = target.arena.clone()
        expected = before.clone()
        sent = 0
        for index, side in enumerate((source, other)):
            peer = await target.let_write(side)
            for offset in range(4):
                blocks = [8 * index + offset * 2, 8 * index + offset * 2 + 1, 20 + offset]
                to = [31 - 3 * (4 * index + offset) - i for i in range(3)]
                send, _ = pair(f"t{index}.{offset}", side, target, blocks, to)
                side.manager.send(msgspec.structs.replace(send, targets=[peer]))
                expected[to] = side.arena[blocks]
                sent += 1
        for side in (source, other):
            for _ in range(sent // 2):
                result = await side.result()
                assert (result.error, result.num_bytes) == (None, 3 * BLOCK_BYTES)
        assert torch.equal(target.arena, expected)


@pytest.mark.parametrize("backend", ONE_SIDED)
async def test_a_closed_link_takes_no_more_writes_and_the_next_one_does(backend: str) -> None:
    async with sides(backend=backend, timeout_s=5.0) as (source, target):
        closing = asyncio.create_task(target.close(source.peer(1)))  # told before it is open
        old = await target.let_write(source, 1)
        await closing
        before = target.arena.clone()
        send, _ = pair("late", source, target, [1], [2])
        if backend == "mooncake":  # others rely on their senders, which are told before
            source.manager.send(msgspec.structs.replace(send, targets=[old]))
            assert (await source.result()).error_kind == "backend"
            assert torch.equal(target.arena, before)
        new = await target.let_write(source, 2)
        send, _ = pair("next", source, target, [1], [2])
        source.manager.send(msgspec.structs.replace(send, targets=[new]))
        assert (await source.result()).error is None
        assert torch.equal(target.arena[2], source.arena[1])
        source.manager.handle(DisconnectLink(targets=[new]))
        async with asyncio.timeout(DEADLINE_S):
            while any(map(is_open, source.opened)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def is_open(arena: RemoteArena) -> bool:
    """Whether what its owner leaves behind would stay in use."""
    try:
        arena.write(torch.zeros(2, dtype=torch.uint8), [(0, 0, 2)])
    except RuntimeError:
        return False
    return True


_HAS_THE_ARENA_MAPPED = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + sys.argv[1])
listener.listen()
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("backend", "waiting", "end"),
    [
        *(("shm", waiting, end) for waiting in ("link", "epoch") for end in ("link", "epoch", "process")),
        pytest.param("mooncake", "link", "epoch", marks=needs_mooncake),
        pytest.param("mooncake", "epoch", "link", marks=needs_mooncake),
    ],
)
async def test_a_mapped_arena_is_not_used_again_until_its_senders_part_has_ended(
    monkeypatch: pytest.MonkeyPatch, backend: str, waiting: str, end: str
) -> None:
    monkeypatch.setenv("MC_INTRANODE_NVLINK", "1")  # else Mooncake maps nothing
    target, sender = Side(0, 20.0, 1 << 20, backend), Side(1, 20.0, 1 << 20, backend)
    for side in (target, sender):
        await side.manager.start()
    peer, here = sender.peer(1), sender.manager.endpoint.partition(" ")[2]
    name = f"{os.getpid()}-{waiting}-{end}"
    with subprocess.Popen([sys.executable, "-c", _HAS_THE_ARENA_MAPPED, name], stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        if end == "process":
            await asyncio.to_thread(process.stdout.readline)
            peer = msgspec.structs.replace(peer, endpoint=f"{name} {here}")
        target.manager.handle(OpenLink(source_id="source", link_epoch=1, sources=[peer]))
        addressed = (await target.result()).peers
        ended = asyncio.create_task(target.manager.stop() if waiting == "epoch" else target.close(peer, False))
        await asyncio.sleep(0.05)
        assert not ended.done(), "the sender may still write"
        if end == "link":
            sender.manager.handle(DisconnectLink(targets=addressed))
        if end == "epoch":
            await sender.manager.stop()
        process.kill()
        await asyncio.wait_for(ended, DEADLINE_S)
    if waiting == "link":
        await target.manager.stop()
    if end != "epoch":
        await sender.manager.stop()


async def test_an_epoch_does_not_end_while_a_sender_may_write_and_one_elsewhere_is_refused() -> None:
    target, sender = Side(0, 0.3, 1 << 20, "shm"), Side(1, 0.3, 1 << 20, "shm")
    for side in (target, sender):
        await side.manager.start()
    elsewhere = msgspec.structs.replace(sender.peer(1), endpoint="socket elsewhere")
    target.manager.handle(OpenLink(source_id="elsewhere", link_epoch=2, sources=[elsewhere]))
    assert "another host" in (await target.result()).error
    await target.let_write(sender, 1)
    with pytest.raises(KVTransferError, match="has it been stopped"):
        await target.manager.stop()
    await sender.manager.stop()


def test_mooncakes_settings_come_from_the_configuration_and_then_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mooncake.json"
    monkeypatch.setenv(CONFIG_PATH_VARIABLE, str(path))
    path.write_text('{"protocol": "rdma", "device_name": "mlx5_0", "local_hostname": "10.0.0.1"}')
    assert MooncakeSettings.load(None, None) == MooncakeSettings("rdma", "mlx5_0", "10.0.0.1")
    assert MooncakeSettings.load("tcp", "mlx5_1") == MooncakeSettings("tcp", "mlx5_1", "10.0.0.1")
    for text, said in (
        ('{"protocl": "tcp"}', "unknown key 'protocl'"),
        ('{"protocol": "udp"}', "protocol must be one of tcp, rdma, nvlink"),
        ('{"metadata_server": "etcd://host"}', "metadata_server must be 'P2PHANDSHAKE'"),
        ("[]", "does not hold a JSON object"),
        ("{", "cannot read"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            MooncakeSettings.load(None, None)
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "3")
    with pytest.raises(StartupError, match="unset MC_TRANSFER_TIMEOUT"):
        MooncakeSettings().prepare_environment(5.0, None)


# --- instances of different numbers of ranks ------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_every_rank_gets_each_of_its_heads_once_from_a_rank_that_has_it(num_heads: int) -> None:
    sizes = [1, 2, 4, 8]
    for num_sources, num_targets in itertools.product(sizes, sizes):
        got: dict[int, list[int]] = {target: [] for target in range(num_targets)}
        for route in routes(num_heads, num_sources, num_targets):
            sent, expected = (
                heads_of(num_heads, num_sources, route.source),
                heads_of(num_heads, num_targets, route.target),
            )
            width, part = len(sent) // route.source_part.count, route.source_part.index
            got[route.target] += sent[part * width : (part + 1) * width]
            assert expected[route.target_part.index * width :][:width] == sent[part * width :][:width]
        assert got == {target: heads_of(num_heads, num_targets, target) for target in range(num_targets)}
        if num_sources == num_targets:
            assert all(route.source == route.target for route in routes(num_heads, num_sources, num_targets))


def heads_of(num_heads: int, size: int, rank: int) -> list[int]:
    width = max(1, num_heads // size)
    first = rank * num_heads // size
    return list(range(first, first + width))


SPLITS = [(4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 1, 2)]


@pytest.mark.parametrize(
    ("backend", "num_heads", "num_sources", "num_targets"),
    [
        (backend, *split)
        for backend in ("nccl", "shm", "tests.support.stream_transfer:StreamKVTransfer")
        for split in SPLITS
    ]
    + [pytest.param("mooncake", 4, 2, 1, marks=needs_mooncake)],  # each of its engines takes a second to end
)
async def test_heads_are_split_anew_on_the_way_and_checksums_prove_it(
    backend: str, num_heads: int, num_sources: int, num_targets: int
) -> None:
    everything = torch.randint(0, 256, (NUM_BLOCKS, ROWS, num_heads, HEAD_BYTES), dtype=torch.uint8)

    def make(rank: int, number: int, size: int) -> Side:
        return Side(rank, 20.0, 1 << 20, backend, Shard(number, size, num_heads, ROWS))

    sources = [make(number, number, num_sources) for number in range(num_sources)]
    targets = [make(8 + number, number, num_targets) for number in range(num_targets)]
    for number, side in enumerate(sources):
        side.arena.copy_(everything[:, :, heads_of(num_heads, num_sources, number)].reshape(NUM_BLOCKS, -1))
    blocks, to = [3, 4, 5, 9, 20], [7, 8, 1, 30, 2]
    untouched = [block for block in range(NUM_BLOCKS) if block not in to]
    before = [side.arena.clone() for side in targets]
    try:
        for side in (*sources, *targets):
            await side.manager.start()
        source_peers, target_peers = [side.peer(1) for side in sources], []
        for side in targets:
            side.manager.handle(OpenLink(source_id="source", link_epoch=1, sources=source_peers))
            target_peers.append((await side.result()).peers[0])
        first, second = (LayerGroup(index=index, count=2) for index in range(2))
        for layers in (ALL_LAYERS, first, second):  # all of it at once, and then once more in halves
            if layers == first:
                for side in targets:
                    side.arena[to] = 0
            order: dict[str, Any] = {"transfer_id": str(layers), "request_id": "t", "generations": [0] * len(blocks)}
            for side in targets:
                if not side.manager.one_sided:
                    side.manager.handle(ReceiveBlocks(**order, sources=source_peers, block_ids=to, layers=layers))
            send = SendBlocks(
                **order, targets=target_peers, block_ids=blocks, target_block_ids=to, layers=layers, checksum=True
            )
            for side in sources:
                side.manager.send(send)
            sent = [await side.result() for side in sources]
            assert [result.error for result in sent] == [None] * num_sources
            for side in targets:
                if not side.manager.one_sided:
                    assert (await side.result()).error is None
            checksums = [result.checksums[0] for result in sent]
            finish = FinishBlocks(
                transfer_id=str(layers),
                num_sources=num_sources,
                block_ids=to,
                generations=[0] * len(to),
                checksums=checksums,
                layers=layers,
            )
            for side in targets:
                side.manager.handle(finish)
                assert (await side.result()).error is None
            for number, side in enumerate(targets if layers != first else ()):
                expected = everything[:, :, heads_of(num_heads, num_targets, number)].reshape(NUM_BLOCKS, -1)
                assert torch.equal(side.arena[to], expected[blocks])
                assert torch.equal(side.arena[untouched], before[number][untouched])
        for side in targets:
            side.arena[30, -5] ^= 1
            # What is in order is not sorted again: only what one-sided senders of several ranks have left.
            if not (side.manager.one_sided and num_sources > num_targets):
                side.manager.handle(msgspec.structs.replace(finish, transfer_id="again"))
                result = await side.result()
                assert (result.error_kind, "1 of 5" in result.error) == ("checksum", True)
    finally:
        for side in (*sources, *targets):
            await side.manager.cancel_all()
            await side.manager.stop()


class WrongSize(KVTransferBase):
    """A user's backend that delivers too little, and where it may not begin says why."""

    async def start(self) -> None:
        if self.context.rank == 7:
            raise OSError("no cable")

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        pass

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        return torch.zeros(7, dtype=torch.uint8)


class Stubborn(KVTransferBase):
    """A user's backend that ends when it has what it waits for, and not before."""

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        await self._until(go_on)

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        await self._until(go_on)
        return torch.zeros(BLOCK_BYTES, dtype=torch.uint8)

    async def _until(self, event: asyncio.Event) -> None:
        while not event.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await event.wait()


go_on = asyncio.Event()


async def test_a_backend_that_does_not_heed_a_cancellation_holds_up_nothing_and_writes_nothing() -> None:
    async with sides(backend=f"{__name__}:Stubborn") as (source, target):
        before = target.arena.clone()
        send, receive = pair("t", source, target, [1], [2])
        target.manager.handle(receive)
        source.manager.send(send)
        await asyncio.sleep(0.05)
        source.manager.cancel("t")
        target.manager.handle(CloseLink(source_id="source", link_epoch=0, sources=[source.peer()], senders_done=True))
        assert (await source.result()).error == "cancelled"
        assert (await target.result()).error == "cancelled"
        assert isinstance(await target.result(), LinkClosed)
        go_on.set()
        await asyncio.sleep(0.05)
        assert torch.equal(target.arena, before)


async def test_a_backend_that_delivers_the_wrong_size_is_a_failed_transfer() -> None:
    async with sides(backend=f"{__name__}:WrongSize") as (source, target):
        _, receive = pair("t", source, target, [1], [2])
        target.manager.handle(receive)
        result = await target.result()
        assert result.error is not None
        assert "7 bytes" in result.error


async def test_a_backend_that_is_none_is_refused_by_name() -> None:
    context = KVTransferContext(0, 1, "127.0.0.1", None, torch.device("cpu"), 1.0, 1)
    with pytest.raises(ConfigError, match=r"kv_transfer.backend.*no_such_module"):
        make_backend("no_such_module:Backend", context)
    with pytest.raises(ConfigError, match="not a subclass"):
        make_backend("hbserve.messages.transfer:Peer", context)
    arena = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    manager = make_manager(f"{__name__}:WrongSize", dataclasses.replace(context, rank=7), arena, print)
    with pytest.raises(StartupError, match="WrongSize: OSError: no cable"):
        await manager.start()


async def test_the_lookup_buffer_holds_arrivals_back_until_there_is_space() -> None:
    buffer = KVLookupBuffer(10)
    await buffer.reserve(8)
    buffer.put("a", torch.zeros(8, dtype=torch.uint8))
    waiting = asyncio.create_task(buffer.reserve(8))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert "a" in buffer
    buffer.pop("a")
    await asyncio.wait_for(waiting, DEADLINE_S)
    assert buffer.used_bytes == 8

"""One-sided transfers: right bytes, no writes on a closed link, and no reuse of an arena while a sender may write."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.errors import ConfigError, KVTransferError, StartupError
from hbserve.kv_transfer.one_sided.mooncake import CONFIG_PATH_VARIABLE, MooncakeSettings
from hbserve.kv_transfer.one_sided.transfers import coalesce
from hbserve.messages.transfer import DisconnectLink, OpenLink
from hbserve.platform.remote_arena import RemoteArena
from tests.support.engines import needs_mooncake
from tests.support.transfer_sides import BLOCK_BYTES, DEADLINE_S, Side, pair, sides

ONE_SIDED = ["shm", pytest.param("mooncake", marks=needs_mooncake)]


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 12))
def test_runs_move_the_same_blocks_and_none_could_be_joined(source: list[int], target: list[int], count: int) -> None:
    runs = coalesce(zip((8 * block for block in source[:count]), (8 * block for block in target), strict=False), 8)
    moved = [(here + byte, there + byte) for here, there, length in runs for byte in range(0, length, 8)]
    assert sorted(moved) == sorted((8 * a, 8 * b) for a, b in zip(source[:count], target[:count], strict=True))
    ends = {(here + length, there + length) for here, there, length in runs}
    assert not ends & {(here, there) for here, there, _ in runs}


@pytest.mark.parametrize("backend", ONE_SIDED)
async def test_one_sided_writes_arrive_where_they_belong_and_nowhere_else(backend: str) -> None:
    async with sides(3, backend=backend) as (source, other, target):
        before = target.arena.clone()
        expected = before.clone()
        sent = 0
        for index, side in enumerate((source, other)):
            peer = await target.open_link(side)
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
        closing = asyncio.create_task(target.close(source.peer(1)))  # before it is open
        old = await target.open_link(source, 1)
        await closing
        before = target.arena.clone()
        send, _ = pair("late", source, target, [1], [2])
        if backend == "mooncake":  # other backends rely on their senders, which are told first
            source.manager.send(msgspec.structs.replace(send, targets=[old]))
            assert (await source.result()).error_kind == "backend"
            assert torch.equal(target.arena, before)
        new = await target.open_link(source, 2)
        send, _ = pair("next", source, target, [1], [2])
        source.manager.send(msgspec.structs.replace(send, targets=[new]))
        assert (await source.result()).error is None
        assert torch.equal(target.arena[2], source.arena[1])
        source.manager.handle(DisconnectLink(targets=[new]))
        async with asyncio.timeout(DEADLINE_S):
            while any(map(is_open, source.opened)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def is_open(arena: RemoteArena) -> bool:
    """Whether this process still has the arena mapped, so that its memory stays in use."""
    try:
        arena.write(torch.zeros(2, dtype=torch.uint8), [(0, 0, 2)])
    except RuntimeError:
        return False
    return True


_MAPPING_SENDER = """
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
async def test_a_mapped_arena_is_not_used_again_while_its_sender_may_write(
    monkeypatch: pytest.MonkeyPatch, backend: str, waiting: str, end: str
) -> None:
    monkeypatch.setenv("MC_INTRANODE_NVLINK", "1")  # else Mooncake maps nothing
    target, sender = Side(0, 20.0, 1 << 20, backend), Side(1, 20.0, 1 << 20, backend)
    for side in (target, sender):
        await side.manager.start()
    peer, here = sender.peer(1), sender.manager.endpoint.partition(" ")[2]
    name = f"{os.getpid()}-{waiting}-{end}"
    with subprocess.Popen([sys.executable, "-c", _MAPPING_SENDER, name], stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
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
    await target.open_link(sender, 1)
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

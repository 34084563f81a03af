"""Two-sided transfers between two arenas over real sockets: right bytes, right matching, no late writes."""

from __future__ import annotations

import asyncio
import gc
import os
import socket

import msgspec
import torch

from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.kv_transfer.two_sided.buffers import KVLookupBuffer
from hbserve.messages.transfer import FinishBlocks
from tests.support.ports import free_ports
from tests.support.transfer_sides import BLOCK_BYTES, DEADLINE_S, NUM_BLOCKS, pair, sides


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


async def test_a_receive_that_starts_just_after_the_last_batch_is_served() -> None:
    async with sides(timeout_s=2.0) as (source, target):
        await target.open_link(source)
        for index in range(400):
            send, receive = pair(f"t{index}", source, target, [1], [3])
            for _ in range(index % 8):
                await asyncio.sleep(0)
            target.manager.handle(receive)
            source.manager.send(send)
            assert [(await side.result()).error for side in (source, target)] == [None, None]


async def test_unrequested_arrivals_free_their_space_when_their_link_ends() -> None:
    async with sides(buffer_size=2 * BLOCK_BYTES) as (source, target):
        for epoch in range(1, 4):  # a leak in one epoch would block the next
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


async def test_a_lost_link_gives_its_connections_back_before_any_garbage_collection() -> None:
    async with sides(timeout_s=2.0) as (source, target):

        async def lose_a_link(epoch: int) -> None:
            await target.open_link(source, epoch)
            good, lost = (pair(f"{name}{epoch}", source, target, [1], [3], 0, epoch) for name in ("good", "lost"))
            source.manager.send(good[0])
            target.manager.handle(good[1])
            assert [(await side.result()).error for side in (source, target)] == [None, None]
            target.manager.handle(lost[1])
            await asyncio.sleep(0.05)  # its receive waits for the sender
            await target.close(source.peer(epoch))
            assert (await target.result()).error is not None
            source.manager.send(lost[0])
            assert (await source.result()).error is not None

        gc.disable()  # errors refer to what they happened in
        try:
            await lose_a_link(1)
            before = len(os.listdir("/proc/self/fd"))
            for epoch in range(2, 5):
                await lose_a_link(epoch)
            async with asyncio.timeout(DEADLINE_S):
                while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - descriptors have no event
                    await asyncio.sleep(0.05)
        finally:
            gc.enable()


async def test_a_configured_port_can_be_used_again_at_once() -> None:
    (port,) = free_ports(1)
    context = KVTransferContext(0, 1, "127.0.0.1", port, torch.device("cpu"), 5.0, 1 << 20)
    for _ in range(2):
        manager = make_manager("nccl", context, torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), print)
        await manager.start()
        with socket.create_connection(("127.0.0.1", port)):  # as when an instance starts again
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


async def test_an_absent_sender_does_not_delay_others() -> None:
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


async def test_checksums_find_blocks_that_differ_from_what_was_sent() -> None:
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

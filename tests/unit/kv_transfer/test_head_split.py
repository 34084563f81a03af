"""Transfers between instances of different numbers of ranks."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
import torch

from hbserve.kv_transfer.head_split import Shard, routes
from hbserve.messages.transfer import (
    ALL_LAYERS,
    ConnectLink,
    FinishBlocks,
    LayerGroup,
    OpenLink,
    ReceiveBlocks,
    SendBlocks,
)
from tests.support.engines import needs_mooncake
from tests.support.transfer_sides import DEADLINE_S, HEAD_BYTES, NUM_BLOCKS, ROWS, Side


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
async def test_heads_are_split_anew_in_a_transfer_and_checksums_prove_it(
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
        for layers in (ALL_LAYERS, first, second):  # all at once, and then once more in halves
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
            # After one-sided senders of several ranks, a second FinishBlocks would merge merged blocks.
            if not (side.manager.one_sided and num_sources > num_targets):
                side.manager.handle(msgspec.structs.replace(finish, transfer_id="again"))
                result = await side.result()
                assert (result.error_kind, "1 of 5" in result.error) == ("checksum", True)
    finally:
        for side in (*sources, *targets):
            await side.manager.cancel_all()
            await side.manager.stop()


@pytest.mark.parametrize(("backend", "num_targets", "num_buffers"), [("nccl", 1, 6), ("nccl", 2, 12), ("shm", 2, 2)])
async def test_a_link_has_its_buffers_before_the_first_transfer(
    backend: str, num_targets: int, num_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    empty = torch.empty

    def note(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        allocated.extend([tensor.nbytes] * (tensor.nbytes > 1 << 18))
        return tensor

    source = Side(0, 20.0, 1 << 20, backend, Shard(0, 1, 2, ROWS))
    targets = [Side(8 + n, 20.0, 1 << 20, backend, Shard(n, num_targets, 2, ROWS)) for n in range(num_targets)]
    sides, blocks = [source, *targets], [3, 9, 4]
    monkeypatch.setattr(torch, "empty", note)
    try:
        for side in sides:
            await side.manager.start()
        peers = [await target.open_link(source, 1) for target in targets]
        source.manager.handle(ConnectLink(targets=peers))
        async with asyncio.timeout(DEADLINE_S):
            while len(allocated) < num_buffers:  # noqa: ASYNC110 - the links' threads tell nobody
                await asyncio.sleep(0.01)
        order: dict[str, Any] = {"transfer_id": "t", "request_id": "t", "block_ids": blocks, "generations": [0] * 3}
        for target in targets:
            if not target.manager.one_sided:
                target.manager.handle(ReceiveBlocks(**order, sources=[source.peer(1)]))
        source.manager.send(SendBlocks(**order, targets=peers, target_block_ids=blocks))
        for side in sides if not source.manager.one_sided else [source]:
            assert (await side.result()).error is None
        assert len(allocated) == num_buffers
    finally:
        for side in sides:
            await side.manager.cancel_all()
            await side.manager.stop()

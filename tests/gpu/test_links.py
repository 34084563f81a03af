"""KV links between two ranks on one GPU: all that a first transfer needs is there when the link opens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.head_split import Shard
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.messages.transfer import ConnectLink, LayerGroup, OpenLink, Peer, ReceiveBlocks, SendBlocks

pytestmark = pytest.mark.gpu
DEADLINE_S = 30.0
NUM_BLOCKS, ROWS, ROW_BYTES = 64, 64, 2048


async def test_the_first_transfer_allocates_nothing_on_the_gpu() -> None:
    device = torch.device("cuda", 0)
    results: asyncio.Queue[Any] = asyncio.Queue()
    arenas, managers, peers = [], [], []
    for rank in range(2):
        context = KVTransferContext(
            rank=rank, epoch=1, host="127.0.0.1", port=None, device=device, timeout_s=20.0, buffer_size=64 << 20
        )
        arena = torch.randint(0, 256, (NUM_BLOCKS, ROWS * ROW_BYTES), dtype=torch.uint8, device=device)
        sharing = ArenaSharing(None, lambda handle, num_bytes: pytest.fail("nothing is mapped"))
        manager = make_manager("nccl", context, arena, results.put_nowait, Shard(num_rows=ROWS), sharing=sharing)
        await manager.start()
        arenas.append(arena)
        managers.append(manager)
        peers.append(Peer(rank=rank, epoch=1, endpoint=manager.endpoint, link_epoch=1))
    sender, receiver = managers
    try:
        receiver.handle(OpenLink(source_id="s", link_epoch=1, sources=peers[:1]))
        opened = await asyncio.wait_for(results.get(), DEADLINE_S)
        sender.handle(ConnectLink(targets=opened.peers))

        async def move(name: str, blocks: list[int], layers: LayerGroup) -> None:
            order: dict[str, Any] = {"transfer_id": name, "request_id": name, "generations": [0] * len(blocks)}
            order |= {"block_ids": blocks, "layers": layers}
            receiver.handle(ReceiveBlocks(**order, sources=peers[:1]))
            sender.send(SendBlocks(**order, targets=opened.peers, target_block_ids=blocks))
            for _ in range(2):
                assert (await asyncio.wait_for(results.get(), DEADLINE_S)).error is None

        def num_allocations() -> int:
            return int(torch.cuda.memory_stats(device)["num_device_alloc"])

        async with asyncio.timeout(DEADLINE_S):  # the links' threads tell nobody when they are ready
            before = -1
            while before != num_allocations():
                before = num_allocations()
                await asyncio.sleep(1.0)
        everywhere = list(range(0, NUM_BLOCKS, 2))
        for half in range(2):
            await move(f"half {half}", everywhere, LayerGroup(index=half, count=2))
        await move("neighbours", [1, 3], LayerGroup(index=0, count=1))
        assert num_allocations() == before
        moved = [*everywhere, 1, 3]
        assert torch.equal(arenas[1][moved], arenas[0][moved])
    finally:
        for manager in managers:
            await manager.cancel_all()
            await manager.stop()

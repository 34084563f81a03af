"""Both ends of KV transfers in one process: arenas, managers, and the commands of a scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch

from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.head_split import Shard
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.rank_transfers import make_manager
from hbserve.messages.transfer import CloseLink, LinkClosed, LinkOpened, OpenLink, Peer, ReceiveBlocks, SendBlocks
from hbserve.platform.cpu import CpuPlatform
from hbserve.platform.remote_arena import RemoteArena

NUM_BLOCKS, ROWS, HEAD_BYTES = 32, 8, 128
BLOCK_BYTES = ROWS * HEAD_BYTES
ONLY_RANK = Shard(num_rows=ROWS)
DEADLINE_S = 30.0


class Side:
    """One end of a transfer: an arena, a manager with its backend, and the results that it reported."""

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

    async def open_link(self, source: Side, link_epoch: int = 0) -> Peer:
        """Open a link from another side to here; return this side's address for it."""
        sources = [source.peer(link_epoch)]
        self.manager.handle(OpenLink(source_id="source", link_epoch=link_epoch, sources=sources))
        opened = await self.result()
        assert isinstance(opened, LinkOpened)
        assert opened.error is None
        return opened.peers[0]

    async def close(self, source: Peer, senders_done: bool = True) -> None:
        """Close a link from that side."""
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

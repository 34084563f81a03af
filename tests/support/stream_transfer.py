"""A user's KV transfer backend over plain TCP, for tests to break."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import torch

from hbserve.errors import KVTransferError
from hbserve.kv_transfer.base import KVTransferBase, KVTransferContext


class StreamKVTransfer(KVTransferBase):
    """One connection for each transfer: a line (sender's rank, number of bytes, transfer), then the bytes."""

    def __init__(self, context: KVTransferContext) -> None:
        super().__init__(context)
        self._server: asyncio.Server | None = None
        self._arrivals: defaultdict[tuple[int, str], asyncio.Future[torch.Tensor]] = defaultdict(asyncio.Future)

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return str(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._take, self.context.host, 0)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank, size, name = (await reader.readline()).decode().rstrip("\n").split(" ", 2)
        data = await reader.readexactly(int(size))
        self._arrivals[int(rank), name].set_result(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        writer.close()

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        try:
            _, writer = await asyncio.open_connection(self.context.host, int(self.peers[target_rank].endpoint))
            writer.write(f"{self.context.rank} {kv_buffer.nbytes} {request_id}\n".encode())
            writer.write(kv_buffer.numpy().tobytes())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError as error:
            raise KVTransferError(f"cannot send: {error}") from error

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        try:
            return await self._arrivals[source_rank, request_id]
        finally:
            del self._arrivals[source_rank, request_id]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

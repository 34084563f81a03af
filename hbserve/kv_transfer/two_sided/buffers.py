"""Bounded memory of two-sided transfers. Used in the event loop of a rank process."""

from __future__ import annotations

import asyncio

import torch


class ByteBudget:
    """Counter of bytes in use: a reservation waits until it fits; one larger than the capacity waits until it is alone.

    Args:
        capacity_bytes: bytes that may be reserved at the same time.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._waiting: set[asyncio.Future[None]] = set()

    async def reserve(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` fit, and reserve them."""
        while self.used_bytes and self.used_bytes + num_bytes > self.capacity_bytes:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            try:
                await changed
            finally:
                self._waiting.discard(changed)
        self.used_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        """Return reserved bytes. This does not wait, so a cancellation cannot prevent it."""
        self.used_bytes -= num_bytes
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)


class KVLookupBuffer(ByteBudget):
    """Buffers that have arrived before they were asked for, by name.

    `reserve` makes an arrival wait while others fill the capacity. Meanwhile the link receives nothing, which slows
    the sender down.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._arrived: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._arrived

    def put(self, name: str, buffer: torch.Tensor) -> None:
        """Store an arrival whose bytes have been reserved."""
        assert name not in self._arrived, f"transfer {name} arrived twice"
        self._arrived[name] = buffer

    def pop(self, name: str) -> torch.Tensor:
        """Take an arrival out, and free its bytes."""
        buffer = self._arrived.pop(name)
        self.free(buffer.nbytes)
        return buffer

    def drop(self, prefix: str) -> None:
        """Free all arrivals whose names begin with ``prefix``, because their link has ended."""
        for name in [name for name in self._arrived if name.startswith(prefix)]:
            self.pop(name)

"""Bounded memory as a number of bytes."""

from __future__ import annotations

import asyncio


class ByteBudget:
    """Takers wait until what they want fits; one that wants more than all of it goes alone.

    Args:
        capacity_bytes: the bound.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._waiting: set[asyncio.Future[None]] = set()

    async def take(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` fit, and take them."""
        while self.used_bytes and self.used_bytes + num_bytes > self.capacity_bytes:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            try:
                await changed
            finally:
                self._waiting.discard(changed)
        self.used_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Return what was taken. It does not wait, so nothing can keep it from being done."""
        self.used_bytes -= num_bytes
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)

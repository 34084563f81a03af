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
        self._changed = asyncio.Condition()

    async def take(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` fit, and take them."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.used_bytes == 0 or self.used_bytes + num_bytes <= self.capacity_bytes
            )
            self.used_bytes += num_bytes

    async def give_back(self, num_bytes: int) -> None:
        """Return what was taken."""
        async with self._changed:
            self.used_bytes -= num_bytes
            self._changed.notify_all()

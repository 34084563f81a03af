"""Bounded memory as a number of bytes.

Arrivals waiting for whoever wants them.
"""

from __future__ import annotations

import asyncio

import torch


class KVLookupBuffer:
    """Matches buffers that arrive in any order with the receives that ask for them by name.

    Bounded: `wait_for_space` holds an arrival back while others fill the buffer, which is the
    back-pressure on the sender.

    Args:
        capacity_bytes: of all arrivals that have not been taken.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._budget = ByteBudget(capacity_bytes)
        self._arrived: dict[str, torch.Tensor] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of arrivals, those on their way included."""
        return self._budget.used_bytes

    async def wait_for_space(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` more fit, and take them."""
        await self._budget.take(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Return space that was taken for something that did not arrive, or was wanted already."""
        self._budget.give_back(num_bytes)

    def put(self, name: str, buffer: torch.Tensor) -> None:
        """File an arrival whose space has been taken."""
        assert name not in self._arrived, f"transfer {name} arrived twice"
        self._arrived[name] = buffer

    def __contains__(self, name: str) -> bool:
        return name in self._arrived

    def take(self, name: str) -> torch.Tensor:
        """Hand out an arrival that is there."""
        buffer = self._arrived.pop(name)
        self._budget.give_back(buffer.nbytes)
        return buffer

    def drop(self, prefix: str) -> None:
        """Let go of all arrivals whose names begin so: nobody will ask for them."""
        for name in [name for name in self._arrived if name.startswith(prefix)]:
            self.take(name)


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

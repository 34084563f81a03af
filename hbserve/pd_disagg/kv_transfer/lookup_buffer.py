"""Arrivals waiting for whoever wants them."""

from __future__ import annotations

import torch

from hbserve.pd_disagg.kv_transfer.byte_budget import ByteBudget


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

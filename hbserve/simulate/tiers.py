"""A simulated tier: memory of the host that all devices share, and copies that take the time of their bytes."""

from __future__ import annotations

from collections.abc import Callable

from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierCommand, TierInfo, TierResult
from hbserve.simulate.clock import SimulatedClock

_COPY_BYTES_PER_S = 49.6e9
"""Pinned memory of the host from and to an H200, checksums included (docs/kv_tiers.md)."""
_COPY_DELAY_S = 0.5e-3
"""Time from a decision to the first byte."""


class SimulatedHostTier:
    """The memory; ``num_slots``: blocks that fit."""

    def __init__(self, num_slots: int) -> None:
        self.info = TierInfo(name="host", memory="simulated", num_slots=num_slots)


class SimulatedLanes:
    """The copies of one device, one after the other in each direction. They take no time from its steps."""

    def __init__(self, clock: SimulatedClock, block_bytes: int) -> None:
        self._clock, self._block_bytes = clock, block_bytes
        self._free_at = {StoreBlocks: 0.0, LoadBlocks: 0.0}

    def copy(self, command: TierCommand, send: Callable[[TierResult], None]) -> None:
        """Begin a copy after those before it, and send its result at its end; all contents are intact."""
        num_bytes = len(command.slots) * self._block_bytes
        seconds = num_bytes / _COPY_BYTES_PER_S
        end = max(self._clock.now + _COPY_DELAY_S, self._free_at[type(command)]) + seconds
        self._free_at[type(command)] = end
        result = TierResult(
            epoch=command.epoch,
            job_id=command.job_id,
            failures={},
            error=None,
            checksums=[[1]] * len(command.slots) if isinstance(command, StoreBlocks) else [],
            num_bytes=num_bytes,
            seconds=seconds,
        )
        self._clock.at(end, lambda: send(result))

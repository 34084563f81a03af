"""The host tier: slots in memory of the host that all instances of a host share."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator, Sequence

import torch

from hbserve.kv_tiers.base import BlockName, SlotTier
from hbserve.messages.tiers import HostMemory
from hbserve.platform import Platform

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 30
"""Bytes that are pinned at once. A copy must not cross the border of two pieces."""


def slots_per_rank(memory: HostMemory, num_ranks: int, block_bytes: int) -> int:
    """Count the slots that fit. Each rank has its part of every slot in a region of its own.

    Args:
        block_bytes: of one rank's part of a block.
    """
    return _region_bytes(memory, num_ranks) // block_bytes


def _region_bytes(memory: HostMemory, num_ranks: int) -> int:
    num_bytes = memory.num_bytes // num_ranks
    return num_bytes - num_bytes % mmap.PAGESIZE


class HostTier(SlotTier):
    """One rank's region of the host's memory, as slots.

    On a GPU the memory is pinned in the background, piece by piece, because gigabytes take seconds. Copies to and from
    memory that is not pinned yet are right, and slower. Of the workers that share a device only one copies, so these
    pin at their first copy.

    Args:
        rank, num_ranks: of the instance.
        block_bytes: of one rank's part of a block.

    Raises:
        RuntimeError: the memory is gone.
    """

    may_hang = False

    def __init__(self, memory: HostMemory, platform: Platform, rank: int, num_ranks: int, block_bytes: int) -> None:
        region_bytes = _region_bytes(memory, num_ranks)
        whole = platform.attach_shared_host(memory.handle, memory.num_bytes)
        self._region = whole[rank * region_bytes : (rank + 1) * region_bytes]
        self._block_bytes = block_bytes
        self.num_slots = slots_per_rank(memory, num_ranks, block_bytes)
        self._platform = platform
        self._has_pinned = platform.name != "cuda"
        if not platform.is_shared:
            self._start_pinning()

    def _start_pinning(self) -> None:
        if not self._has_pinned:
            self._has_pinned = True
            threading.Thread(target=self._pin, name="kv-tier-pin", daemon=True).start()

    def _pin(self) -> None:
        try:
            for begin in range(0, len(self._region), _PIECE_BYTES):
                self._platform.pin_host(self._region[begin : begin + _PIECE_BYTES])
        except RuntimeError as error:
            logger.warning("the host tier is not pinned, and copies are slower: %s", error)

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        """Copy on the current stream."""
        for slots, buffer in self._pieces([name.slot for name in names], values.view(-1)):
            slots.copy_(buffer, non_blocking=True)
        return {}

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        """Copy on the current stream."""
        for slots, buffer in self._pieces([name.slot for name in names], values.view(-1)):
            buffer.copy_(slots, non_blocking=True)
        return {}

    def _pieces(self, slots: Sequence[int], buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the bytes of each run of neighbouring slots, and their place in the buffer."""
        self._start_pinning()
        size, done = self._block_bytes, 0
        while done < len(slots):
            count = 1
            while done + count < len(slots) and slots[done + count] == slots[done] + count:
                count += 1
            begin, end, at = slots[done] * size, (slots[done] + count) * size, done * size
            while begin < end:
                border = min(end, begin - begin % _PIECE_BYTES + _PIECE_BYTES)
                yield self._region[begin:border], buffer[at : at + border - begin]
                at, begin = at + border - begin, border
            done += count

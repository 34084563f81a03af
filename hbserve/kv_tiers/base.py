"""The interface of storage for KV blocks. Its methods are called in the threads of lanes (`hbserve.kv_tiers.lane`)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hbserve.messages.tiers import LoadBlocks, StoreBlocks


class SlotStorage(ABC):
    """One rank's part of a tier's slots.

    Attributes:
        may_hang: a call may take any time. Then a job that is late is given up between two calls, and what such a call
            returns later is not used.
    """

    may_hang: bool

    @abstractmethod
    def write(self, command: StoreBlocks, first: int, blocks: torch.Tensor, checksums: torch.Tensor) -> dict[int, str]:
        """Write blocks into the slots from ``first`` of a job on.

        Args:
            blocks: uint8 ``[block, byte]``, on the rank's device; ready on the current stream.
            checksums: of the blocks, int64 ``[block]``, likewise.

        Returns:
            What went wrong, by place of the block in the job; see `TierResult`.
        """

    @abstractmethod
    def read(self, command: LoadBlocks, first: int, blocks: torch.Tensor) -> dict[int, str]:
        """Read the slots from ``first`` of a job on into blocks, on the current stream; as `write`."""

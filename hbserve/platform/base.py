"""The device seam: what the rest of HBServe asks of a device, whatever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch


class Platform(ABC):
    """One device of one process."""

    name: str
    device: torch.device

    @abstractmethod
    def activate(self) -> None:
        """Make this process use the device: its threads or its card. Called once, before any tensor."""

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Memory that this process could still allocate on the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    @abstractmethod
    def describe(self) -> str:
        """The device in words, for logs and status."""

    @abstractmethod
    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        """A torch.distributed process group of ranks on this host, with the fastest library for the device.

        Args:
            store: where the ranks meet.
            timeout: of a collective operation.
        """

    def allocate_arena(self, num_bytes: int) -> torch.Tensor:
        """One contiguous uint8 tensor of ``num_bytes``, contents undefined.

        Raises:
            RuntimeError: if the device has not that much memory (torch's own error).
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

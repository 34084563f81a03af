"""The device seam: what the rest of HBServe asks of a device, whatever it is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from hbserve.platform.remote_arena import RemoteArena


@dataclass(frozen=True)
class SharedArena:
    """Memory that other processes can attach to.

    Attributes:
        tensor: uint8, contiguous, in this process.
        handle: what `Platform.attach_arena` takes in another process of this host; printable.
    """

    tensor: torch.Tensor
    handle: str


class SmallSum(Protocol):
    """Sums of small tensors over the ranks of a group, in memory of its own, on the current stream.

    Attributes:
        flags: int64 ``[ranks]``, addresses of zeros on each device, for kernels to signal with.
    """

    flags: torch.Tensor

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write a summand of this shape, one of two in turn; None if it cannot sum such."""

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is a `place`."""

    def addresses(self, x: torch.Tensor) -> torch.Tensor:
        """Where all ranks have the `place` ``x``: int64 ``[ranks]``, on the device."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what the ranks have written there, in place; ``x`` is this rank's `place`."""


class Platform(ABC):
    """One device of one process.

    Attributes:
        is_shared: whether other workers have the device as well.
    """

    name: str
    device: torch.device
    is_shared: bool = False

    @abstractmethod
    def activate(self) -> None:
        """Make this process use the device: its threads or its card, and its share of them.

        Called once, before any tensor, by the thread that launches work.
        """

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Memory that this process could still allocate on the device."""

    @abstractmethod
    def held_memory_bytes(self) -> int:
        """Memory that this process alone holds: no arenas of others, and no context of the device."""

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

    def make_small_sum(self, store: Any, rank: int, size: int) -> SmallSum | None:
        """A quicker way than the process group's to sum what is small, if the device has one."""
        return None

    def allocate_arena(self, num_bytes: int) -> torch.Tensor:
        """One contiguous uint8 tensor of ``num_bytes``, contents undefined.

        Raises:
            RuntimeError: if the device has not that much memory (torch's own error).
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def allocate_shared_arena(self, num_bytes: int) -> SharedArena:
        """As `allocate_arena`, in memory that other processes can attach to.

        It lives as long as this process: nothing of it is left to remove afterwards, however that ends.

        Raises:
            RuntimeError: if the device has not that much memory.
        """

    @abstractmethod
    def attach_arena(self, handle: str, num_bytes: int) -> torch.Tensor:
        """Another process' arena in this one, without a copy: uint8 ``[num_bytes]``.

        Raises:
            RuntimeError: if it is gone, or not of that size.
        """

    def allocate_shared_host(self, num_bytes: int) -> SharedArena:
        """As `allocate_shared_arena`, in the host's memory; zeros.

        Raises:
            RuntimeError: if there is not that much memory.
        """
        # A file without a name: others open it through this process' descriptor, which is never closed, and the
        # kernel frees it with the last process that has it mapped.
        descriptor = os.memfd_create("hbserve-arena")
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # all of it now, or an error here and not a SIGBUS later
        except OSError as error:
            os.close(descriptor)
            raise RuntimeError(f"cannot reserve {num_bytes} bytes of shared memory: {error.strerror}") from None
        handle = f"/proc/{os.getpid()}/fd/{descriptor}"
        return SharedArena(self.attach_shared_host(handle, num_bytes), handle)

    def attach_shared_host(self, handle: str, num_bytes: int) -> torch.Tensor:
        """As `attach_arena`, of what `allocate_shared_host` has made.

        Raises:
            RuntimeError: if it is gone, or not of that size.
        """
        # torch would make a missing file and lengthen a short one.
        try:
            size_bytes = os.stat(handle).st_size
        except OSError as error:
            raise RuntimeError(f"the shared memory {handle} is gone: {error.strerror}") from None
        if size_bytes != num_bytes:
            raise RuntimeError(f"the shared memory {handle} has {size_bytes} bytes, not {num_bytes}")
        return torch.from_file(handle, shared=True, size=num_bytes, dtype=torch.uint8)

    @abstractmethod
    def open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        """Another process' arena, to be written into; on a GPU it may lie on another one than this process'.

        Raises:
            RuntimeError: if it is gone, or not of that size.
        """

    def probe(self) -> None:
        """Touch the device, so that one that has failed says so.

        Raises:
            RuntimeError: if it has.
        """
        self.synchronize()

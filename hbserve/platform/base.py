"""The interface of a device, which the rest of HBServe uses for GPUs and CPUs alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from hbserve.platform import shared_memory
from hbserve.platform.remote_arena import RemoteArena


@dataclass(frozen=True)
class SharedArena:
    """Memory that other processes can attach to.

    Attributes:
        tensor: the memory in this process: uint8, contiguous.
        handle: argument of `Platform.attach_arena` in another process of this host; printable.
    """

    tensor: torch.Tensor
    handle: str


class SmallSum(Protocol):
    """Sums of small tensors over the ranks of a group, in memory of its own, on the current stream.

    Attributes:
        flags: int64 ``[ranks]``, addresses of zeros on each device, with which kernels signal each other.
    """

    flags: torch.Tensor

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return memory for a summand, one of two places in turn; None if it cannot sum such a tensor."""

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is a `place`."""

    def addresses(self, x: torch.Tensor) -> torch.Tensor:
        """Return the addresses of the `place` ``x`` on all ranks: int64 ``[ranks]``, on the device."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sum the `place` ``x`` over the ranks, in place: the sum lasts until the place is written again."""


class Platform(ABC):
    """One device of one process.

    Methods that allocate memory raise RuntimeError if there is too little. Methods that attach to or open another
    process's memory raise RuntimeError if it is gone or has another size.

    Attributes:
        is_shared: whether other workers use the device as well.
    """

    name: str
    device: torch.device
    is_shared: bool = False

    @abstractmethod
    def activate(self) -> None:
        """Make this process use the device: its card or its threads, and its share of them.

        The thread that launches work calls it once, before it makes any tensor.
        """

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Return the memory that this process could still allocate on the device."""

    @abstractmethod
    def held_memory_bytes(self) -> int:
        """Return the memory that this process alone holds, without attached arenas and the device's context."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all work that this process has launched."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the device in words, for logs and status."""

    @abstractmethod
    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        """Make a torch.distributed process group of ranks on this host, with the fastest library for the device.

        Args:
            store: store through which the ranks find each other.
            timeout: timeout of a collective operation.
        """

    def make_small_sum(self, store: Any, rank: int, size: int) -> SmallSum | None:
        """Make a sum of small tensors that is faster than the process group's; None if the device has none."""
        return None

    def allocate_arena(self, num_bytes: int) -> torch.Tensor:
        """Allocate one contiguous uint8 tensor with undefined contents."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def allocate_shared_arena(self, num_bytes: int) -> SharedArena:
        """Allocate an arena that other processes can attach to, with undefined contents.

        It lives as long as this process. The end of the process frees it, however the process ends.
        """

    @abstractmethod
    def attach_arena(self, handle: str, num_bytes: int) -> torch.Tensor:
        """Attach to another process's arena without a copy: uint8 ``[num_bytes]``."""

    def allocate_shared_host(self, num_bytes: int) -> SharedArena:
        """Allocate shared memory of the host, with zeros; otherwise like `allocate_shared_arena`."""
        descriptor = shared_memory.create("hbserve-arena", num_bytes)  # stays open, so that others can open it
        try:
            shared_memory.reserve(descriptor, num_bytes)
        except RuntimeError:
            os.close(descriptor)
            raise
        handle = shared_memory.handle_of(descriptor)
        return SharedArena(self.attach_shared_host(handle, num_bytes), handle)

    def attach_shared_host(self, handle: str, num_bytes: int) -> torch.Tensor:
        """Attach to memory from `allocate_shared_host`, like `attach_arena`."""
        # torch would create a missing file and lengthen a short one, so check first.
        try:
            size_bytes = os.stat(handle).st_size
        except OSError as error:
            raise RuntimeError(f"the shared memory {handle} is gone: {error.strerror}") from None
        if size_bytes != num_bytes:
            raise RuntimeError(f"the shared memory {handle} has {size_bytes} bytes, not {num_bytes}")
        return torch.from_file(handle, shared=True, size=num_bytes, dtype=torch.uint8)

    def pin_host(self, memory: torch.Tensor) -> None:  # noqa: B027 - only a device that copies by itself needs it
        """Pin memory of the host, so that the device copies it beside the steps and at its full rate.

        Args:
            memory: uint8, contiguous, from the border of a page on; no part of it may be pinned already.

        Raises:
            RuntimeError: the system does not pin so much.
        """

    @abstractmethod
    def open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        """Open another process's arena to write into it; it may lie on another GPU of this host."""

    def probe(self) -> None:
        """Use the device, to find out whether it has failed.

        Raises:
            RuntimeError: the device has failed.
        """
        self.synchronize()

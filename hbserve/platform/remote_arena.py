"""Another process's arena, for a sender that writes into it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any

import torch

from hbserve.platform import cuda_driver

ByteRun = tuple[int, int, int]
"""Offset in the source, offset in the target, number of bytes."""


class RemoteArena(ABC):
    """Memory of another process of this host that this process may write."""

    @abstractmethod
    def write(self, source: torch.Tensor, runs: list[ByteRun]) -> None:
        """Copy runs of bytes and return when they have arrived. Only one thread may call it at a time.

        Args:
            source: uint8, contiguous, on this process's device.

        Raises:
            RuntimeError: the device reports an error.
        """

    @abstractmethod
    def close(self) -> None:
        """Detach, after the last `write` and in its thread; until then the memory of a dead owner stays allocated."""


class RemoteHostArena(RemoteArena):
    """An arena in shared memory of the host, mapped as ``arena`` (uint8)."""

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena

    def write(self, source: torch.Tensor, runs: list[ByteRun]) -> None:
        flat = source.view(-1)
        with torch.inference_mode():
            for source_offset, target_offset, length in runs:
                self._arena[target_offset : target_offset + length].copy_(flat[source_offset : source_offset + length])

    def close(self) -> None:
        self._arena = torch.empty(0)


class RemoteDeviceArena(RemoteArena):
    """An arena in device memory of the same GPU or a peer; copy engines write it while steps run.

    It is not a tensor, because torch would copy memory of another GPU to this one.

    Args:
        memory: result of `cuda_driver.open_handle`.
        device: this process's device.
    """

    def __init__(self, memory: cuda_driver.DeviceMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def write(self, source: torch.Tensor, runs: list[ByteRun]) -> None:
        torch.cuda.set_device(self._device)  # the stream belongs to this device's context
        source_address, target_address = source.data_ptr(), self._memory.address
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        for source_offset, target_offset, length in runs:
            cuda_driver.copy(target_address + target_offset, source_address + source_offset, length, stream)
        self._stream.synchronize()

    def close(self) -> None:
        torch.cuda.set_device(self._device)
        cuda_driver.close_handle(self._memory)

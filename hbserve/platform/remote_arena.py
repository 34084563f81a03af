"""Another process' arena, as far as writing into it goes."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any

import torch

from hbserve.platform import cuda_ipc

ByteRun = tuple[int, int, int]
"""Offset here, offset there, number of bytes."""


class RemoteArena(ABC):
    """Memory of another process of this host that this one may write."""

    @abstractmethod
    def write(self, source: torch.Tensor, runs: list[ByteRun]) -> None:
        """Copy runs of bytes there; return when they are there. One thread at a time.

        Args:
            source: uint8, contiguous, on this process' device.

        Raises:
            RuntimeError: if the device says so.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it, after the last `write` and in its thread: only then is the memory of a dead owner free."""


class RemoteHostArena(RemoteArena):
    """Shared memory.

    Args:
        arena: uint8, mapped.
    """

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
    """Device memory, of the same GPU or a peer, written by its copy engines beside the steps.

    Not a tensor: torch would take what lies on another GPU for something to be copied here.

    Args:
        memory: opened by `cuda_ipc.open_handle`.
        device: this process' own.
    """

    def __init__(self, memory: cuda_ipc.DeviceMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def write(self, source: torch.Tensor, runs: list[ByteRun]) -> None:
        torch.cuda.set_device(self._device)  # the thread's context is whose the stream is
        source_address, target_address = source.data_ptr(), self._memory.address
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        for source_offset, target_offset, length in runs:
            cuda_ipc.copy(target_address + target_offset, source_address + source_offset, length, stream)
        self._stream.synchronize()

    def close(self) -> None:
        torch.cuda.set_device(self._device)
        cuda_ipc.close_handle(self._memory)

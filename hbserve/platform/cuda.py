"""An NVIDIA GPU as a device."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hbserve.platform import Partition, cuda_driver
from hbserve.platform.base import Platform, SharedArena, SmallSum
from hbserve.platform.cuda_share import CudaShare, is_whole
from hbserve.platform.peer_sum import PeerSum, can_reach_each_other, holds_for_all
from hbserve.platform.remote_arena import RemoteArena, RemoteDeviceArena

logger = logging.getLogger(__name__)
dist: Any = torch.distributed  # its stubs lack the process groups


class CudaPlatform(Platform):
    """One CUDA device.

    Args:
        gpu_id: index among the visible devices.
        partition: share of the device; None: no other worker uses it.
    """

    name = "cuda"

    def __init__(self, gpu_id: int, partition: Partition | None) -> None:
        self.device = torch.device("cuda", gpu_id)
        self.is_shared = partition is not None
        self._partition = partition or Partition()
        self._share: CudaShare | None = None

    def activate(self) -> None:
        torch.cuda.set_device(self.device)
        total = torch.cuda.get_device_properties(self.device).multi_processor_count
        if not is_whole(total, self._partition.percentage, self._partition.end):
            torch.zeros(1, device=self.device)  # makes the device's primary context, which a share needs
            self._share = CudaShare(self.device, self._partition.percentage, self._partition.end)
            torch.cuda.set_stream(self._share.stream)
        else:
            # Not the default stream: work that waits for the default stream, such as the events of Mooncake's copies,
            # would then wait for steps.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def free_memory_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def held_memory_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        count = torch.cuda.get_device_properties(self.device).multi_processor_count
        if self._share is not None:
            count = self._share.num_multiprocessors
        return f"{torch.cuda.get_device_name(self.device)} (cuda:{self.device.index}, {count} multiprocessors)"

    def allocate_shared_arena(self, num_bytes: int) -> SharedArena:
        self._make_current()
        memory = cuda_driver.allocate(num_bytes)
        return SharedArena(torch.as_tensor(memory, device=self.device), cuda_driver.export_handle(memory))

    def attach_arena(self, handle: str, num_bytes: int) -> torch.Tensor:
        self._make_current()
        return torch.as_tensor(cuda_driver.open_handle(handle, num_bytes), device=self.device)

    def pin_host(self, memory: torch.Tensor) -> None:
        self._make_current()
        cuda_driver.pin(memory.data_ptr(), memory.numel())

    def open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        self._make_current()
        return RemoteDeviceArena(cuda_driver.open_handle(handle, num_bytes), self.device)

    def probe(self) -> None:
        torch.zeros(1, device=self.device).add_(1).cpu()

    def _make_current(self) -> None:
        """Make torch's context current in the calling thread: the driver calls of `cuda_driver` use it."""
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)

    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)

    def make_small_sum(self, store: Any, rank: int, size: int) -> SmallSum | None:
        if not can_reach_each_other(store, rank, size, self.device):
            logger.warning("rank %d: the GPUs cannot read each other's memory; NCCL sums small tensors, too", rank)
            return None
        peer_sum = None
        try:
            peer_sum = PeerSum(store, rank, size, self.device)
        except RuntimeError as error:  # some containers forbid processes to share device memory
            logger.warning("rank %d: GPUs may not share memory; NCCL sums small tensors, too: %s", rank, error)
        return peer_sum if holds_for_all(store, "shares", rank, size, peer_sum is not None) else None

"""NVIDIA GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hbserve.platform.base import Platform

dist: Any = torch.distributed  # its stubs lack the process groups


class CudaPlatform(Platform):
    """One CUDA device.

    Args:
        gpu_id: index among the visible devices.
    """

    name = "cuda"

    def __init__(self, gpu_id: int) -> None:
        self.device = torch.device("cuda", gpu_id)

    def activate(self) -> None:
        torch.cuda.set_device(self.device)

    def free_memory_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)} (cuda:{self.device.index})"

    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)

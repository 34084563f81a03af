"""NVIDIA GPUs."""

from __future__ import annotations

import torch

from hbserve.platform.base import Platform


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

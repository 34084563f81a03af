"""The CPU as a device: its threads are the partition."""

from __future__ import annotations

import os

import torch

from hbserve.platform.base import Platform


class CpuPlatform(Platform):
    """``num_threads`` threads of this machine.

    Args:
        num_threads: threads for tensor operations.
    """

    name = "cpu"

    def __init__(self, num_threads: int) -> None:
        self.device = torch.device("cpu")
        self.num_threads = num_threads

    def activate(self) -> None:
        torch.set_num_threads(self.num_threads)

    def free_memory_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def describe(self) -> str:
        return f"cpu ({self.num_threads} threads)"

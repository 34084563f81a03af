"""The CPU as a device: its threads are the partition."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hbserve.platform.base import Platform

dist: Any = torch.distributed  # its stubs lack the process groups


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
        # What the kernel would give, its file cache included; "free" pages alone are few on any busy machine.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def describe(self) -> str:
        return f"cpu ({self.num_threads} threads)"

    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

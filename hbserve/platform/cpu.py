"""The CPU as a device; a partition is a number of threads."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hbserve.platform import shared_memory
from hbserve.platform.base import Platform, SharedArena
from hbserve.platform.remote_arena import RemoteArena, RemoteHostArena

dist: Any = torch.distributed  # its stubs lack the process groups


class CpuPlatform(Platform):
    """``num_threads`` threads of this machine.

    Args:
        num_threads: threads for tensor operations.
        niceness: added to the process's niceness, so that it yields to others.
    """

    name = "cpu"

    def __init__(self, num_threads: int, niceness: int = 0) -> None:
        self.device = torch.device("cpu")
        self.num_threads = num_threads
        self._niceness = niceness

    def activate(self) -> None:
        torch.set_num_threads(self.num_threads)
        os.nice(self._niceness)

    def free_memory_bytes(self) -> int:
        return shared_memory.available_bytes()

    def held_memory_bytes(self) -> int:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def describe(self) -> str:
        return f"cpu ({self.num_threads} thread{'s' * (self.num_threads > 1)})"

    def allocate_shared_arena(self, num_bytes: int) -> SharedArena:
        return self.allocate_shared_host(num_bytes)

    def attach_arena(self, handle: str, num_bytes: int) -> torch.Tensor:
        return self.attach_shared_host(handle, num_bytes)

    def open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        return RemoteHostArena(self.attach_arena(handle, num_bytes))

    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

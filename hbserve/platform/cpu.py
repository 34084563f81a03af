"""The CPU as a device: its threads are the partition."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hbserve.platform.base import Platform, SharedArena
from hbserve.platform.remote_arena import RemoteArena, RemoteHostArena

dist: Any = torch.distributed  # its stubs lack the process groups


class CpuPlatform(Platform):
    """``num_threads`` threads of this machine.

    Args:
        num_threads: threads for tensor operations.
        niceness: added to the process' own, for one that shall yield to others.
    """

    name = "cpu"

    def __init__(self, num_threads: int, niceness: int = 0) -> None:
        self.device = torch.device("cpu")
        self.num_threads = num_threads
        self._niceness = niceness
        self._shared: list[int] = []

    def activate(self) -> None:
        torch.set_num_threads(self.num_threads)
        os.nice(self._niceness)

    def free_memory_bytes(self) -> int:
        # What the kernel would give, its file cache included; "free" pages alone are few on any busy machine.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def held_memory_bytes(self) -> int:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def describe(self) -> str:
        return f"cpu ({self.num_threads} thread{'s' * (self.num_threads > 1)})"

    def allocate_shared_arena(self, num_bytes: int) -> SharedArena:
        # A file without a name: others open it through this process' descriptor, and the kernel
        # frees it with the last process that has it mapped.
        descriptor = os.memfd_create("hbserve-arena")
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # all of it now, or an error here and not a SIGBUS later
        except OSError as error:
            os.close(descriptor)
            raise RuntimeError(f"cannot reserve {num_bytes} bytes of shared memory: {error.strerror}") from None
        self._shared.append(descriptor)
        handle = f"/proc/{os.getpid()}/fd/{descriptor}"
        return SharedArena(self.attach_arena(handle, num_bytes), handle)

    def attach_arena(self, handle: str, num_bytes: int) -> torch.Tensor:
        # torch would make a missing file and lengthen a short one.
        try:
            there = os.stat(handle).st_size
        except OSError as error:
            raise RuntimeError(f"the shared memory {handle} is gone: {error.strerror}") from None
        if there != num_bytes:
            raise RuntimeError(f"the shared memory {handle} has {there} bytes, not {num_bytes}")
        return torch.from_file(handle, shared=True, size=num_bytes, dtype=torch.uint8)

    def open_arena(self, handle: str, num_bytes: int) -> RemoteArena:
        return RemoteHostArena(self.attach_arena(handle, num_bytes))

    def make_process_group(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

"""Shared memory of the host as files without a name, which other processes open through their owner's descriptor.

The kernel frees such memory with the last process that has it open or mapped.
"""

from __future__ import annotations

import os
from pathlib import Path


def available_bytes() -> int:
    """Return the memory of the host that is free, or that the kernel would free."""
    # MemAvailable includes the file cache, which the kernel gives up; free pages alone are few on a busy machine.
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def create(name: str, num_bytes: int) -> int:
    """Make a file of a size; returns its descriptor. It takes no memory until `reserve`, or until it is written."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def reserve(descriptor: int, num_bytes: int) -> None:
    """Give a file its memory now: an error here instead of a SIGBUS later. Gigabytes take seconds.

    Raises:
        RuntimeError: if there is too little.
    """
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        raise RuntimeError(f"cannot reserve {num_bytes} bytes of shared memory: {error.strerror}") from None


def handle_of(descriptor: int) -> str:
    """Return the path at which other processes of this host open a file of this process."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"

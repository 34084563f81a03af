"""Owner of host memory that holds KV blocks: the launcher, for the instances that it starts.

The launcher outlives its workers, the holder of a GPU's memory and the scheduler. So the blocks survive all of them.
"""

from __future__ import annotations

import os
import secrets
import socket

from hbserve.errors import StartupError
from hbserve.messages.tiers import HostMemory
from hbserve.platform import shared_memory


class HostMemoryOwner:
    """Shared memory of this host, until `close`.

    Attributes:
        memory: what other processes need to map it.

    Raises:
        StartupError: if no memory is so large.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._descriptor = shared_memory.create("hbserve-kv-host", num_bytes)
        except OSError as error:
            raise _too_large(num_bytes, error.strerror) from None
        self.memory = HostMemory(
            name=f"{socket.gethostname()}/{secrets.token_hex(8)}",
            handle=shared_memory.handle_of(self._descriptor),
            num_bytes=num_bytes,
        )

    def reserve(self) -> None:
        """Take the memory from the system; may take seconds.

        Raises:
            StartupError: if there is too little.
        """
        num_bytes, available = self.memory.num_bytes, shared_memory.available_bytes()
        try:
            if num_bytes > available:
                raise RuntimeError(f"{available} bytes are available")
            shared_memory.reserve(self._descriptor, num_bytes)
        except RuntimeError as error:
            raise _too_large(num_bytes, error) from None

    def close(self) -> None:
        """Free the memory when the last process has unmapped it."""
        os.close(self._descriptor)


def _too_large(num_bytes: int, why: object) -> StartupError:
    return StartupError(f"kv_cache.host_bytes: this host cannot give {num_bytes} bytes: {why}")

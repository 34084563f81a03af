"""A wire between two network namespaces that delays every frame and drops some, on kernels with or without netem."""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_MAX_BYTES = 1 << 16


class LossyWire:
    """Two TAP devices, and a thread that carries frames from one to the other.

    Attributes:
        devices: names of its ends, which may be moved to other namespaces while it runs.
        num_carried, num_dropped: frames so far.

    Raises:
        OSError: where TAP devices cannot be made.
    """

    def __init__(self, name: str, delay_s: float, loss: float, seed: int = 0) -> None:
        self.devices = [f"{name}a", f"{name}b"]
        self.num_carried = self.num_dropped = 0
        self._delay_s, self._loss, self._random = delay_s, loss, random.Random(seed)
        self._ends = [_open_tap(device) for device in self.devices]
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wire")
        self._thread.start()

    def _carry(self) -> None:
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        on_the_way: list[tuple[float, int, int, bytes]] = []  # due, number, where to, frame
        number = 0
        while True:
            wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
            readable, _, _ = select.select([*self._ends, self._wake], [], [], wait_s)
            if self._wake in readable:
                return
            for end in readable:
                frame = os.read(end, _MAX_BYTES)
                if self._random.random() < self._loss:
                    self.num_dropped += 1
                    continue
                number += 1
                heapq.heappush(on_the_way, (time.monotonic() + self._delay_s, number, other[end], frame))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(on_the_way)
                self.num_carried += 1
                try:
                    os.write(end, frame)
                except OSError:  # that end is down
                    self.num_dropped += 1

    def close(self) -> None:
        """Take it away; its devices go with it."""
        os.close(self._stop)
        self._thread.join()
        for descriptor in (self._wake, *self._ends):
            os.close(descriptor)


def _open_tap(device: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor

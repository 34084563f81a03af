"""Ports for systems whose parts must be told each other's beforehand."""

from __future__ import annotations

import random
import socket

_chance = random.Random()
# Below those that the kernel gives to whoever asks for any: nobody gets one of these in the meantime.
_RANGE = range(15_000, 32_000)


def free_ports(number: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    ports: list[int] = []
    while len(ports) < number:
        port = _chance.choice(_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports

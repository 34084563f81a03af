"""ZeroMQ sockets in an asyncio event loop, with sends that do not wait.

pyzmq's own asyncio sockets cannot mix awaited receives with plain sends: ZeroMQ announces events
by the edge of a file descriptor, and a plain send may swallow the edge that a receive waits for.
Here every operation looks again after itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import cast

import zmq


class SocketClosed(Exception):
    """A socket was closed while somebody waited to receive from it."""


class AsyncSocket:
    """One socket, used from one event loop (the one that is running when it first receives).

    Queues are unbounded: flow is controlled by who may have how much in flight, not by blocking.

    Args:
        socket: not yet bound or connected; owned from here on.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def send(self, frames: list[bytes]) -> None:
        """Send without waiting.

        Raises:
            zmq.Again: if there is nobody to send to (with ``zmq.IMMEDIATE``).
            zmq.ZMQError: with errno EHOSTUNREACH from a ROUTER whose peer is gone.
        """
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            self.look()

    async def receive(self) -> list[bytes]:
        """The next message. One task at a time.

        Raises:
            SocketClosed: if it is closed meanwhile.
        """
        while True:
            with contextlib.suppress(zmq.Again):
                return self.socket.recv_multipart(zmq.NOBLOCK)
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                self._loop.add_reader(self.socket.FD, self._wake)
            assert self._waiter is None, "two tasks receive from one socket"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def look(self) -> None:
        """Wake whoever waits to receive, if there is something."""
        if self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        # Reading EVENTS is what arms the descriptor's edge again.
        events = cast(int, self.socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self, linger_ms: int = 0) -> None:
        """Close; what has been sent may still leave for so long."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(SocketClosed())
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.socket.FD)
        self.socket.close(linger=linger_ms)

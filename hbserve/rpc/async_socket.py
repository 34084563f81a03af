"""ZeroMQ sockets in an asyncio event loop, with sends that do not wait.

pyzmq's own asyncio sockets cannot mix awaited receives with plain sends. ZeroMQ announces events by the edge of a
file descriptor, and a plain send may consume the edge that a receive waits for. Here every send therefore checks
afterwards whether a message has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import zmq

MAX_MESSAGE_BYTES = 64 * 2**20
"""Limit of one frame between scheduler and instances. ZeroMQ applies it to every connection, also before its login."""

MAX_REQUEST_BYTES = 16 * 2**20
"""The same for what clients send to the scheduler, and the size of what it decodes in one piece. A request of a million
tokens takes 5 MB."""

LOGIN_TIMEOUT_MS = 5000
"""Time for a connection to log in; ZeroMQ then closes it."""

_MIN_SHARED_BYTES = 2**18
"""A message whose last frame is at least so large is shared with ZeroMQ's threads in place of a copy."""

_MAX_FRAMES = 8
"""Limit of the frames of one message. The protocols use at most three."""


def remove_file(address: str) -> None:
    """Remove the file of a listening socket that is closed, or whose process has ended: ZeroMQ leaves it there."""
    scheme, _, path = address.partition("://")
    if scheme == "ipc":
        Path(path).unlink(missing_ok=True)


class SocketClosed(Exception):
    """Error of a receive whose socket was closed meanwhile."""


class AsyncSocket:
    """Socket of one event loop, the one that runs at its first receive.

    Queues are unbounded: the protocols limit what is in flight, and sends never block.

    Args:
        socket: socket that is not yet bound or connected; closed by this object.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        # A socket that an error has left open must not keep the program from ending, whatever is still unsent.
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def send(self, frames: Sequence[bytes | bytearray]) -> None:
        """Send without waiting. Large frames are not copied, and must not change.

        Raises:
            zmq.Again: if there is no peer (with ``zmq.IMMEDIATE``).
            zmq.ZMQError: with errno EHOSTUNREACH from a ROUTER whose peer has disconnected.
        """
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames[-1]) < _MIN_SHARED_BYTES)
        finally:
            self.look()

    async def receive(self) -> list[bytes]:
        """Wait for the next message and return its frames; only one task may wait at a time.

        A message of too many frames is read to its end, in pieces, and returned as an empty list.

        Raises:
            SocketClosed: if the socket is closed meanwhile.
        """
        while True:
            if self.socket.closed:  # between the message that has woken this task, and now
                raise SocketClosed
            with contextlib.suppress(zmq.Again):
                return await self._frames(self.socket.recv(zmq.NOBLOCK))
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                self._loop.add_reader(self.socket.FD, self._wake)
            assert self._waiter is None, "two tasks receive from one socket"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def _frames(self, first: bytes) -> list[bytes]:
        """Read the rest of a message; ZeroMQ delivers a message only as a whole, so no read waits."""
        frames, num_frames = [first], 1
        while self.socket.getsockopt(zmq.RCVMORE):
            frames.append(self.socket.recv(zmq.NOBLOCK))
            num_frames += 1
            if num_frames > _MAX_FRAMES:
                frames.clear()
                if num_frames % 1000 == 0:
                    await asyncio.sleep(0)  # the loop's other work must not wait for it
        return frames if num_frames <= _MAX_FRAMES else []

    def look(self) -> None:
        """Wake the task that waits to receive, if a message is there."""
        if self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        # Reading EVENTS is what arms the descriptor's edge again.
        events = cast(int, self.socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; messages that were sent before may still leave for ``linger_ms``."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(SocketClosed())
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.socket.FD)
        self.socket.close(linger=linger_ms)

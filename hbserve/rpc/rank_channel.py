"""Typed messages between the event loops of two ranks of one instance.

One end each of a socket pair that rank 0 makes and its child inherits: no name that another process
could connect to, nothing to remove afterwards, and an end of file when the other side is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_LENGTH_BYTES = 4


class RankLine(Generic[T]):
    """One end of a line; frames of a length (little-endian) and a msgpack message.

    Args:
        end: of the socket pair; owned from here on.
        receives: the messages that come, a union of types.
    """

    def __init__(self, end: socket.socket, receives: Any) -> None:
        self._end = end
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._is_over = False

    async def open(self) -> None:
        """Attach to the running event loop; before anything else."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._end)

    def send(self, message: msgspec.Struct) -> None:
        """Send without waiting; dropped if the other side is gone, which its own watcher notices."""
        if self._is_over:
            return
        payload = self._encoder.encode(message)
        self._writer.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)

    async def receive(self) -> T:
        """The next message.

        Raises:
            ConnectionError: if the other side is gone.
        """
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._is_over = True
            raise ConnectionResetError("the other rank has closed the line") from None

    async def close(self) -> None:
        """Close when what has been sent is out, or cannot get out any more."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

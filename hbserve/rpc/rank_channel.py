"""Line between the event loops of two ranks of one instance, for typed messages.

Rank 0 makes a socket pair and its child inherits one end. The pair has no name to which another process could connect,
leaves no file behind, and gives an end of file when the other rank has ended.
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
    """One end of a line; a frame is a length (4 bytes, little-endian) and a msgpack message.

    Args:
        end: end of the socket pair; closed by this object.
        receives: union of the types of the messages that arrive here.
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
        """Send without waiting; dropped if the other rank has ended, which that rank's watcher notices."""
        if self._is_over:
            return
        payload = self._encoder.encode(message)
        self._writer.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)

    async def receive(self) -> T:
        """Wait for the next message.

        Raises:
            ConnectionError: if the other rank has ended.
        """
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._is_over = True
            raise ConnectionResetError("the other rank has closed the line") from None

    async def close(self) -> None:
        """Close when all that was sent has left, or cannot leave any more."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

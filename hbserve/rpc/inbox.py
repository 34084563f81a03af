"""Receiver of typed messages: whatever the frames of a message are, decoding them cannot end the process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from hbserve.rpc.async_socket import AsyncSocket

T = TypeVar("T")
OnDropped = Callable[[str, str], object]

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0
_MAX_REASON_CHARACTERS = 300


class Inbox(Generic[T]):
    """Receiver of the typed messages of one socket. It drops every other message, and reports this from time to time.

    Args:
        receives: union of the types of the messages that arrive here.
        sender: name of the other side, for the log.
        on_dropped: called with the sender and with what was dropped, in words.
    """

    def __init__(
        self, socket: AsyncSocket, receives: Any, sender: str, on_dropped: OnDropped = lambda sender, what: None
    ) -> None:
        self._socket, self._sender, self._report = socket, sender, on_dropped
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._num_frames = 2 if socket.socket.type == zmq.ROUTER else 1
        self._num_dropped = 0
        self._logged_at = -_LOG_INTERVAL_S

    async def receive(self) -> tuple[bytes, T]:
        """Wait for the next message; returns the identity of its sender, which is empty unless this is a ROUTER.

        Raises:
            SocketClosed: if the socket is closed meanwhile.
        """
        while True:
            frames = await self._socket.receive()
            if len(frames) == self._num_frames:
                try:
                    return (frames[0] if self._num_frames > 1 else b""), self._decoder.decode(frames[-1])
                except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as error:
                    self._on_dropped(str(error)[:_MAX_REASON_CHARACTERS] or type(error).__name__)
            else:
                self._on_dropped("a wrong number of frames")
            await asyncio.sleep(0)  # a flood of such messages must not block the loop's other work

    def _on_dropped(self, reason: str) -> None:
        self._num_dropped += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            what = f"dropped {self._num_dropped} invalid message(s): {reason}"
            logger.error("message_dropped: %s: %s", self._sender, what)
            self._num_dropped, self._logged_at = 0, now
            self._report(self._sender, what)

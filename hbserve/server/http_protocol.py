"""HTTP connections whose clients must keep up: who lets the server wait too long is cut off."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 30.0
"""For a request's first line and headers, and for the first request of a connection to begin."""

WRITE_TIMEOUT_S = 60.0
"""For a client to take what fills the connection's buffer (64 KiB, beside the operating system's)."""

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's connection with deadlines for the client.

    Cut off means aborted, not closed: closing would wait for what the client does not take.
    The request at work then ends as with any client that goes away.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_write()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_write()

    def resume_writing(self) -> None:
        self._end_write()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # as soon as the client has taken the rest
            self._begin_write()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # idle, so nothing is lost but what the client has not taken

    def _begin_head(self) -> None:
        self._end_head()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._cut_off, "sent no request")

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _begin_write(self) -> None:
        self._end_write()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._cut_off, "did not read its answer")

    def _end_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _cut_off(self, why: str) -> None:
        logger.info("cut off a client that %s", why)
        self.transport.abort()

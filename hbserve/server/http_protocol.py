"""HTTP connections with deadlines: a client that lets the server wait too long is cut off."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hbserve.messages.supervisor import EventKind
from hbserve.process.events import OnEvent, log_event

HEAD_TIMEOUT_S = 30.0
"""Time for a request's first line and headers to arrive; also from the connection to its first request."""

WRITE_TIMEOUT_S = 60.0
"""Time for a client to read a full buffer of its connection (64 KiB, beside the operating system's buffer)."""

SPARE_DESCRIPTORS = 16
"""So near the limit of file descriptors the log warns: beyond it, the event loop closes connections without a word."""

_WARNING_INTERVAL_S = 60.0

logger = logging.getLogger(__name__)

_next_warning_s = 0.0  # of this process, by `time.monotonic`


class HttpProtocol(HttpToolsProtocol):
    """A connection of uvicorn, with deadlines for the client. uvicorn calls all methods, in the event loop.

    A client that misses a deadline is cut off: the connection is aborted, because closing would wait until the client
    has read the rest. The request in progress then ends as if the client had disconnected.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timers: dict[str, asyncio.TimerHandle] = {}  # "head" and "write", while they run

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer("head", HEAD_TIMEOUT_S, "sent no request")
        _warn_near_limit(transport, self.report_event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer("head")
        self._stop_timer("write")
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._start_timer("head", HEAD_TIMEOUT_S, "sent no request")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer("head")
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("write", WRITE_TIMEOUT_S, "did not read its answer")

    def resume_writing(self) -> None:
        self._stop_timer("write")
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes when the client has read the rest
            self._start_timer("write", WRITE_TIMEOUT_S, "did not read its answer")

    def report_event(self, kind: EventKind, subject: str, text: str) -> None:
        """Report an event of the server; `serve` makes a subclass that does it in its own way."""
        log_event(kind, subject, text)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # idle: only bytes that the client has not read are lost

    def _start_timer(self, name: str, timeout_s: float, reason: str) -> None:
        self._stop_timer(name)
        self._timers[name] = self.loop.call_later(timeout_s, self._cut_off, reason)

    def _stop_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _cut_off(self, reason: str) -> None:
        logger.info("cut off a client that %s", reason)
        self.transport.abort()


def _warn_near_limit(transport: asyncio.Transport, on_event: OnEvent) -> None:
    """Warn if few file descriptors are left. A new one has the lowest free number, so it tells how many are in use."""
    global _next_warning_s
    sock = transport.get_extra_info("socket")
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sock is None or limit == resource.RLIM_INFINITY or sock.fileno() < limit - SPARE_DESCRIPTORS:
        return
    now = time.monotonic()
    if now >= _next_warning_s:
        _next_warning_s = now + _WARNING_INTERVAL_S
        what = f"{sock.fileno()} file descriptors are in use, and the limit is {limit}"
        then = "beyond it the server closes new connections, until others end; raise the limit"
        on_event("descriptors_low", "the API server", f"{what}: {then} (ulimit -n, or LimitNOFILE of systemd)")

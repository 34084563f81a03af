"""HTTP connections with limits: a client that lets the server wait, or sends a head without end, is cut off."""

from __future__ import annotations

import asyncio
import http
import logging
import resource
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hbserve.messages.supervisor import EventKind
from hbserve.process.events import OnEvent, log_event
from hbserve.server.errors import ApiError

HEAD_TIMEOUT_S = 30.0
"""Time for a request's first line and headers to arrive; also from the connection to its first request."""

MAX_HEAD_BYTES = 65536
"""Maximum of a request's first line and headers together, and of whatever else is no body: trailers, extensions."""

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
        self._head_bytes = 0  # that came since the last head, part of a body, or end of a body
        self._is_resuming = False  # the parser reads a head of ours

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer("head", HEAD_TIMEOUT_S, "sent no request")
        _warn_near_limit(transport, self.report_event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer("head")
        self._stop_timer("write")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as error:
            self._refuse(400, f"this is no valid HTTP request: {error.__context__ or error}")
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is no valid HTTP request: {error}")
        else:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
            elif (self.cycle is None or self.cycle.response_complete) and "head" not in self._timers:
                # Bytes of no open request: an empty line, or the rest of a body that was refused.
                self._start_timer("head", HEAD_TIMEOUT_S, "sent no request")

    def on_message_begin(self) -> None:
        if not self._is_resuming:
            self._start_timer("head", HEAD_TIMEOUT_S, "sent no request")
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_resuming and "head" in self._timers:  # later ones are trailers, which no route reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        if self._is_resuming or self.transport.is_closing():
            return
        self._stop_timer("head")
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        # Where a client offers another protocol, the parser ends the message before its body: see `_parse`.
        if not (self.transport.is_closing() or self.parser.should_upgrade()):
            super().on_message_complete()

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

    def _parse(self, data: bytes) -> None:
        """Feed the parser. An offer of another protocol, such as `Upgrade: h2c` of Java's client, has no effect.

        After such a head the parser expects the other protocol. It gets the lines that say how long the body is again,
        as a head of their own, and goes on with the body as that of the request.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                framing = [
                    name + b": " + value + b"\r\n"
                    for name, value in self.headers
                    if name in (b"content-length", b"transfer-encoding")
                ]
                self._is_resuming = True
                self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\n", *framing, b"\r\n"]))
                self._is_resuming = False

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's first line and headers have more than {MAX_HEAD_BYTES} bytes; send fewer")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request, unless an answer has begun, and close the connection."""
        if self.transport.is_closing():
            return
        logger.info("refused a client: %s", message)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = ApiError(status, message, "invalid_request_error").response()
            head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()]
            head += [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", bytes(answer.body)]))
        self.transport.close()

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

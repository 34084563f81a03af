"""uvicorn in an event loop that already runs: listen, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from hbserve.config import ServerConfig
from hbserve.errors import StartupError
from hbserve.process.events import OnEvent, log_event
from hbserve.server.http_protocol import HttpProtocol

_BACKLOG = 2048
"""Number of connections that may wait to be accepted: a burst of clients must not be refused."""

_ERROR_SEND_TIME_S = 3.0
"""Time after the drain's deadline in which the errors of unfinished requests are sent."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with a call when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process that embeds the server handles signals

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


async def serve(
    app: ASGIApp,
    where: ServerConfig | socket.socket,
    stop: asyncio.Event,
    on_ready: Callable[[int], None] = lambda port: None,
    drain_timeout_s: float = 10.0,
    on_deadline: Callable[[], None] = lambda: None,
    tls: tuple[str, str] | None = None,
    on_tls: Callable[[ssl.SSLContext], None] = lambda context: None,
    on_event: OnEvent = log_event,
) -> None:
    """Serve until ``stop`` is set or this call is cancelled; both end it in the same way.

    Args:
        where: address to listen on, or a socket made by `bind`; it is closed in the end.
        on_ready: called with the actual port once connections are accepted.
        drain_timeout_s: time for open requests to finish at the end, while no new connections are accepted.
        on_deadline: called after that time. It must end the open requests; those left are cut off a moment later.
        tls: certificate chain and private key, PEM files.
        on_tls: called with the context that has them; others may be loaded into it at any time.
        on_event: called when few file descriptors are left.

    Raises:
        StartupError: if the server cannot listen on the address; the text names it.
    """
    listener = where if isinstance(where, socket.socket) else bind(where)
    host, port = listener.getsockname()[:2]
    with _closed_on_error(listener, host, port):
        # Only this makes the address ours: Linux lets several sockets bind while none listens.
        listener.listen(_BACKLOG)
    settings = uvicorn.Config(
        app,
        http=type("HttpProtocol", (HttpProtocol,), {"report_event": staticmethod(on_event)}),
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that they close first
        timeout_graceful_shutdown=math.ceil(drain_timeout_s + _ERROR_SEND_TIME_S),
        ssl_certfile=None if tls is None else tls[0],
        ssl_keyfile=None if tls is None else tls[1],
    )
    settings.load()
    if settings.ssl is not None:
        on_tls(settings.ssl)
    server = _Server(settings, lambda: on_ready(port))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="hbserve-http")
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.should_exit = True
        stopping.cancel()
        deadline = asyncio.get_running_loop().call_later(drain_timeout_s, on_deadline)
        await serving
        deadline.cancel()
        listener.close()


def bind(config: ServerConfig) -> socket.socket:
    """Reserve the address before anything slow is started; connections are refused until `serve`.

    Raises:
        StartupError: if the address is not available; the text names it.
    """
    host, port = config.host, config.port
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    with _closed_on_error(listener, host, port):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    return listener


@contextlib.contextmanager
def _closed_on_error(listener: socket.socket, host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}; choose another server.port") from None

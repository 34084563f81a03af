"""The checks of every HTTP request before it reaches a route: its id, its key, its limits, its turn.

Runs in the API server's process, in its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hbserve.config import ServerConfig
from hbserve.errors import HBServeError, ShuttingDownError
from hbserve.process import event_loop, log_format
from hbserve.server.errors import ClientGone, ForbiddenError, UnauthorizedError, api_error
from hbserve.server.fair_gate import FairGate
from hbserve.server.generation import Deadline
from hbserve.server.keys import Keys
from hbserve.server.received_body import ReceivedBody

access = logging.getLogger("hbserve.access")

GENERATING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
OPEN = frozenset({"/health", "/ready", "/ping", "/"})
POLLED = OPEN | {"/metrics", "/stats", "/live", "/v1/semi_pd/status"}
"""Paths that probes, collectors and pages ask for every few seconds; the access log shows them at DEBUG only."""
OPEN_FOLDER, ADMIN_FOLDER, SEMI_PD_FOLDER = "/page/", "/admin/", "/v1/semi_pd"
INSTANCES_FOLDER, PLAN_PATH = "/v1/instances/", "/v1/plan"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_REQUESTS_PER_TURN = 8
"""Requests that begin in one turn of the event loop. Each takes about half a millisecond, and streams must not wait."""
NO_KEY = "-"
"""Name in logs, and queue, of requests without a key."""


class Guard:
    """ASGI middleware around the whole application.

    Args:
        keys: the keys of clients and of the administrator.
        gate: queue for the routes that generate text.
        is_draining: set while the server ends and refuses new work.

    Attributes:
        keys: may be replaced at any time; the next request is checked by the new ones.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, keys: Keys, gate: FairGate, is_draining: asyncio.Event
    ) -> None:
        self._app, self._config, self.keys, self._gate = app, config, keys, gate
        self._is_draining = is_draining
        self._pace = event_loop.Pace(_REQUESTS_PER_TURN)
        # Outermost: a browser must be allowed to read errors too, and its preflight requests have no key.
        self._entry: ASGIApp = self._guarded
        if config.cors_origins:
            self._entry = CORSMiddleware(
                self._guarded,
                allow_origins=config.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI prescribes."""
        await self._entry(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = log_format.request_id.set(request_id)
        began = time.monotonic()
        response = _Response(send, request_id)
        name = NO_KEY
        try:
            name = scope["key_name"] = self._authenticate(scope, headers)
            scope["send"] = send
            body = scope["body"] = ReceivedBody(receive, headers, self._config.max_body_bytes)
            await self._serve(scope, body, response, name)
        except ClientGone:
            pass
        except (HBServeError, HTTPException) as error:
            if response.status is None:
                await api_error(error).response()(scope, receive, response)
            else:
                raise
        finally:
            self._log(scope, response.status, name, time.monotonic() - began)
            log_format.request_id.reset(token)

    def _authenticate(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Return the name of the request's key.

        Raises:
            UnauthorizedError, ForbiddenError
        """
        path: str = scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return NO_KEY
        scheme, _, value = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = value.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", b"").decode("latin-1")
        name = self.keys.name_of(key) if key else None
        reads = scope["method"] in ("GET", "HEAD")
        changes_the_system = not reads and (path.startswith(SEMI_PD_FOLDER) or path == PLAN_PATH)
        if path.startswith((ADMIN_FOLDER, INSTANCES_FOLDER)) or changes_the_system:
            if not self.keys.has_admin:
                raise ForbiddenError("administration is off: there is no admin key (server.admin_key_file)")
            if name != "admin":
                raise UnauthorizedError("this needs the admin key, as 'Authorization: Bearer <key>'")
        elif self.keys.are_required and name is None:
            raise UnauthorizedError("this needs an API key, as 'Authorization: Bearer <key>'")
        return name or NO_KEY

    async def _serve(self, scope: Scope, body: ReceivedBody, response: _Response, name: str) -> None:
        generates = scope["path"] in GENERATING and scope["method"] == "POST"
        if self._is_draining.is_set() and (generates or scope["path"] == "/ready"):
            raise ShuttingDownError("the server is shutting down")
        if not generates:
            await self._pace.wait()
            await self._app(scope, body.receive, response)
            return
        scope["deadline"] = deadline = Deadline(self._config.request_timeout_s)
        self._gate.begin(name)
        try:
            async with deadline.applied():
                await body.read()  # before the turn: a client that sends slowly must not hold one
                await body.while_connected(self._gate.wait_turn(name))
            deadline.waits_since = time.monotonic()
            try:
                await self._pace.wait()
                await self._app(scope, body.receive, response)
            finally:
                self._gate.give_back()
        finally:
            self._gate.end(name)

    def _log(self, scope: Scope, status: int | None, name: str, seconds: float) -> None:
        is_polled = scope["path"] in POLLED or scope["path"].startswith(OPEN_FOLDER)
        level = logging.DEBUG if is_polled else logging.INFO
        if not access.isEnabledFor(level):
            return
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "key": name,
            "ms": round(seconds * 1000, 1),
        }
        text = "{method} {path} {status} {key} {ms} ms".format(**fields)
        access.log(level, "%s", text.replace("\n", " "), extra={"fields": fields})


class _Response:
    """The sending side of a request: adds the request's id, and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._header = b"x-request-id", request_id.encode("latin-1")
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        await self._send(message)

"""Work for an HTTP connection that ends when the connection does: answers, and streams of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hbserve.server.errors import ClientGone, api_error

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], early: deque[Message] | None = None) -> T:
    """Await ``work``; cancel it as soon as the client disconnects.

    Args:
        receive: the connection's ASGI channel.
        early: gets messages that arrive before the work is done; default: they are dropped.

    Raises:
        ClientGone: after the work has been cancelled and has cleaned up.
    """

    async def watch() -> None:
        while (message := await receive())["type"] != "http.disconnect":
            if early is not None:
                early.append(message)

    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working]
    try:
        await asyncio.sleep(0)
        if not working.done():
            watching = asyncio.create_task(watch())
            tasks.append(watching)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()
                raise ClientGone
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class AnswerHead:
    """ASGI middleware that answers HEAD like GET; uvicorn leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI prescribes."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class EventStream(Response):
    """A response of server-sent events, ``data: <JSON>``, ended by ``data: [DONE]`` or by an event that says so.

    The headers are sent with the first event, so an error before that is an ordinary error response. A later error is
    sent as an event and ends the stream. If the client disconnects, the generator is closed.

    Args:
        events: the JSON documents, in lists that are sent together.
        has_names: events are named by their ``type``, and the last of them says that it is the last.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[list[dict[str, Any]]], has_names: bool = False) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # of the empty body that the base class has made
        self._events, self._has_names = events, has_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI prescribes."""
        with suppress(ClientGone):
            await while_connected(receive, self._send_events(send, scope.get("send", send)))

    async def _send_events(self, send: Send, send_body: Send) -> None:
        """Send the head by ``send``; the events by ``send_body``, which no middleware delays."""

        async def send_chunk(chunk: bytes, more: bool = True) -> None:
            await send_body({"type": "http.response.body", "body": chunk, "more_body": more})

        started = False
        async with aclosing(self._events) as events:
            try:
                async for batch in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send_chunk(b"".join(map(self._encode, batch)))
            except Exception as error:
                if not started:
                    raise
                await send_chunk(b"data: " + msgspec.json.encode(api_error(error).body()) + b"\n\n", more=False)
            else:
                await send_chunk(b"" if self._has_names else b"data: [DONE]\n\n", more=False)

    def _encode(self, event: dict[str, Any]) -> bytes:
        name = b"event: " + event["type"].encode() + b"\n" if self._has_names else b""
        return name + b"data: " + msgspec.json.encode(event) + b"\n\n"

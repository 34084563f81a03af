"""Work on behalf of an HTTP connection ends when the connection does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from hbserve.server.errors import ClientGone, api_error

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; cancel it at once when the client disconnects.

    Args:
        receive: the connection's ASGI channel, with the body already read.

    Raises:
        ClientGone: after the work has been cancelled and has cleaned up.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events, ``data: <JSON>``, ended by ``data: [DONE]``.

    The headers are sent with the first event, so an error before that is an ordinary error response.
    A later one is sent as an event and ends the stream. A client that goes away closes the generator.

    Args:
        events: the JSON documents, in lists that are sent together.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[list[dict[str, Any]]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # of the empty body that the base class has made
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI wants it."""
        with suppress(ClientGone):
            await while_connected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        async def send_chunk(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        started = False
        async with aclosing(self._events) as events:
            try:
                async for batch in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send_chunk(b"".join([b"data: " + msgspec.json.encode(event) + b"\n\n" for event in batch]))
            except Exception as error:
                if not started:
                    raise
                await send_chunk(b"data: " + msgspec.json.encode(api_error(error).body()) + b"\n\n", more=False)
            else:
                await send_chunk(b"data: [DONE]\n\n", more=False)

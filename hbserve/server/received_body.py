"""The body of an HTTP request on its way in: limits of size and time, and one place where it lies.

Runs in the API server's process, in its event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from hbserve.server.connection import while_connected
from hbserve.server.errors import ClientGone

PART_TIMEOUT_S = 30.0
"""Time between two parts of a body."""
TIMEOUT_S = 120.0
"""Time for a whole body."""


class ReceivedBody:
    """The receiving side of a request: refuses a body that is too large or too slow, and watches the connection.

    The parts of a body go into one buffer as they arrive. Joining them in the end would hold the event loop up,
    for 20 ms with 30 MB.
    """

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._content = bytearray()
        self._is_complete = self._is_taken = False
        self._deadline = time.monotonic() + TIMEOUT_S
        self._early: deque[Message] = deque()  # received after the body, before the application asked
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > max_bytes:
            raise self._too_large()

    async def read(self) -> None:
        """Receive the whole body.

        Raises:
            ClientGone: the client disconnects before that.
            HTTPException: the body is too large, or too slow.
        """
        while not self._is_complete:
            message = await self._next_part()
            if message["type"] == "http.disconnect":
                raise ClientGone
            self._content += message.get("body", b"")
            self._is_complete = not message.get("more_body", False)
            if len(self._content) > self._max_bytes:
                raise self._too_large()

    async def take(self) -> bytearray:
        """Return the whole body, which `receive` then does not give any more. Errors as in `read`."""
        await self.read()
        self._is_taken = True
        content, self._content = self._content, bytearray()
        return content

    async def receive(self) -> Message:
        """Return the next message as ASGI prescribes: first the whole body, unless `take` has returned it already."""
        if not self._is_taken:
            try:
                return {"type": "http.request", "body": bytes(await self.take()), "more_body": False}
            except ClientGone:  # a response that has begun looks for the disconnect here
                return {"type": "http.disconnect"}
        return self._early.popleft() if self._early else await self._receive()

    async def while_connected(self, work: Coroutine[object, object, None]) -> None:
        """Await ``work``, which may take long; cancel it when the client disconnects. Raises `ClientGone` then."""
        assert self._is_complete
        await while_connected(self._receive, work, self._early)

    async def _next_part(self) -> Message:
        left_s = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(PART_TIMEOUT_S, left_s)):
                return await self._receive()
        except TimeoutError:
            if left_s > PART_TIMEOUT_S:
                raise HTTPException(408, f"no part of the body arrived within {PART_TIMEOUT_S:g} s") from None
            raise HTTPException(408, f"the body did not arrive within {TIMEOUT_S:g} s") from None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body has more than {self._max_bytes} bytes (server.max_body_bytes)")

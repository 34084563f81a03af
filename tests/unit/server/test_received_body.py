"""The body of a request on its way in, as the application sees it."""

from __future__ import annotations

import pytest
from starlette.types import Message

from hbserve.server.errors import ClientGone
from hbserve.server.received_body import ReceivedBody


async def test_a_client_that_leaves_amid_its_body_is_a_disconnect_for_whoever_listens() -> None:
    """A file's response asks for it after it has begun; an error there would be a bug of the server."""

    async def receive() -> Message:
        return parts.pop(0)

    gone: Message = {"type": "http.disconnect"}
    parts: list[Message] = [{"type": "http.request", "body": b"ab", "more_body": True}, gone, gone]
    body = ReceivedBody(receive, {}, 100)
    assert await body.receive() == gone
    assert await body.receive() == gone
    parts.append(gone)
    with pytest.raises(ClientGone):
        await body.take()

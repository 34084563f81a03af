"""Routes of stored responses, and POST /v1/responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from hbserve.frontend.text_engine import TextEngine
from hbserve.server.errors import ResponseNotFoundError
from hbserve.server.generation import Deadline
from hbserve.server.responses.body import ResponsesRequest
from hbserve.server.responses.generation import ResponseGeneration
from hbserve.server.responses.store import ResponseStore, StoredResponse


def install(
    app: FastAPI,
    engine: TextEngine,
    served_name: str,
    check_model: Callable[[str | None], None],
    deadline_of: Callable[[Request], Deadline],
) -> None:
    """Add the routes to the application; its responses are stored in this process."""
    store = ResponseStore()

    def key_of(request: Request) -> str:
        name: str = request.scope.get("key_name", "")  # set by the guard
        return name

    def stored(response_id: str, request: Request) -> StoredResponse:
        response = store.get(response_id, key_of(request))
        if response is None:
            raise ResponseNotFoundError(f"there is no response {response_id!r}", "response_id")
        return response

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        check_model(body.model)
        body.model = served_name
        response = await ResponseGeneration.begin(engine, body, deadline_of(request), store, key_of(request))
        return await response.respond(request.receive)

    @app.get("/v1/responses/{response_id}")
    async def get_response(response_id: str, request: Request) -> Response:
        return Response(stored(response_id, request).response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
        stored(response_id, request)
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        """List the items of the response's input, the latest first; all at once."""
        items = stored(response_id, request).input
        ids, data = list(reversed(items)), [msgspec.Raw(item) for item in reversed(items.values())]
        ends = {"first_id": ids[0], "last_id": ids[-1]} if ids else {"first_id": None, "last_id": None}
        answer = {"object": "list", "data": data, "has_more": False} | ends
        return Response(msgspec.json.encode(answer), media_type="application/json")

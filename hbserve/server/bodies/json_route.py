"""Reading of JSON bodies: light ones in the event loop, others in a text process with limits of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from hbserve import bounded_json
from hbserve.frontend.text_engine import TextEngine


def json_route(engine: TextEngine) -> type[APIRoute]:
    """Return the class of routes whose bodies cost the event loop a bounded time."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                if request.method == "POST" and "json" in request.headers.get("content-type", ""):
                    body = await request.body()
                    if not bounded_json.is_light(body):
                        # Starlette's `Request.json` returns it, instead of reading the body.
                        request._json = await engine.text.read_json(body, engine.max_model_len)
                return await handle(request)

            return handle_bounded

    return JsonRoute

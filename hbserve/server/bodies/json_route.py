"""Reading of JSON bodies: light ones in the event loop, others beside it, with limits of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from hbserve import bounded_json
from hbserve.frontend.text_engine import TextEngine
from hbserve.server.bodies.border import Body

T = TypeVar("T")


def json_route(engine: TextEngine) -> type[APIRoute]:
    """Return the class of routes whose bodies cost the event loop a bounded time.

    A body that is not light is read and checked by ``engine.text``, and the route gets it with ``is_light`` False.
    """

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            kind: Any = None if self.body_field is None else self.body_field.field_info.annotation

            async def handle_bounded(request: Request) -> Response:
                if kind is not None:
                    await _read(engine, request, kind)
                return await handle(request)

            return handle_bounded

    return JsonRoute


async def beside_loop(engine: TextEngine, body: Body, work: Callable[[], T]) -> T:
    """Do work that a body decides: at once for a light body, else beside the event loop."""
    return work() if body.is_light else await engine.text.aside(work)


async def _read(engine: TextEngine, request: Request, kind: type[Body]) -> None:
    """Put the body where FastAPI looks for it."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(415, f"the Content-Encoding {encoding!r} is not supported; send the body as it is")
    received = request.scope.get("body")  # of the guard
    content = await request.body() if received is None else await received.take()
    if not content or "json" not in request.headers.get("content-type", "").lower():
        request._body = bytes(content)
        return
    request._body = b"{}"  # FastAPI asks whether there is one
    if bounded_json.is_light(content):
        request._json = bounded_json.read_light(content)
        return
    value = await engine.text.read_json(content)
    request._json = await engine.text.aside(partial(_checked, kind, value))


def _checked(kind: type[Body], value: Any) -> Body:
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from None
    body.is_light = False
    return body

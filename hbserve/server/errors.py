"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hbserve.errors import (
    ContextLengthError,
    EngineDeadError,
    HBServeError,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    RequestFailedError,
    RequestTimeoutError,
    SchedulerRestartingError,
    ShuttingDownError,
    UnknownInstanceError,
    UnservedError,
    shortened,
)
from hbserve.hints import nearest
from hbserve.process.events import bugs
from hbserve.server.bodies.border import Body, unsupported
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.protocol import (
    AllocationRequest,
    CompletionRequest,
    DetokenizeRequest,
    RoleRequest,
    TokenizeRequest,
)

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/semi_pd/allocation": AllocationRequest,
}


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""


class ResponseNotFoundError(InvalidRequestError):
    """There is no stored response of that id."""


class PreviousResponseNotFoundError(InvalidRequestError):
    """The response that a request continues is not stored."""


class ItemNotFoundError(InvalidRequestError):
    """The item that a request refers to is not stored."""


class UnauthorizedError(HBServeError):
    """The request has no key, or an unknown one."""


class ForbiddenError(HBServeError):
    """The server is configured without the key that this needs."""


class ClientGone(Exception):
    """The client closed its connection before it got its answer."""


def _shown(text: str) -> str:
    """Return a text as the client gets it."""
    return shortened(text).encode("utf-8", "replace").decode()  # lone surrogates are no characters


class ApiError(msgspec.Struct, frozen=True):
    """An error as the client sees it.

    Attributes:
        retry_after_s: value of the Retry-After header, if the client should try again later.
    """

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON body; it is also sent as an event when a stream breaks."""
        param = None if self.param is None else _shown(self.param)
        return {"error": {"message": _shown(self.message), "type": self.type, "param": param, "code": self.code}}

    def response(self) -> Response:
        """Return the HTTP response."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        content = msgspec.json.encode(self.body())
        return Response(content, self.status, headers, media_type="application/json")


_ANSWERS: dict[type, tuple[int, str, str | None]] = {
    ModelNotFoundError: (404, "invalid_request_error", "model_not_found"),
    ResponseNotFoundError: (404, "invalid_request_error", "response_not_found"),
    PreviousResponseNotFoundError: (404, "invalid_request_error", "previous_response_not_found"),
    ItemNotFoundError: (404, "invalid_request_error", "item_not_found"),
    UnknownInstanceError: (404, "invalid_request_error", "instance_not_found"),
    ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequestError: (400, "invalid_request_error", None),
    RateLimitedError: (429, "rate_limit_error", "rate_limited"),
    OverloadedError: (503, "overloaded_error", "overloaded"),
    RequestFailedError: (500, "server_error", "request_failed"),
    UnservedError: (503, "server_error", "no_instance"),
    RequestTimeoutError: (504, "server_error", "request_timeout"),
    ShuttingDownError: (503, "server_error", "shutting_down"),
    SchedulerRestartingError: (503, "server_error", "scheduler_restarting"),
    UnauthorizedError: (401, "authentication_error", "invalid_api_key"),
    ForbiddenError: (403, "permission_error", "forbidden"),
    EngineDeadError: (503, "server_error", "engine_dead"),
}
"""Status, type and code by class of the error; a subclass that is not listed has those of its base."""


def api_error(error: Exception) -> ApiError:
    """Return what the client is told about an error. Bugs are logged, and the client is told no details."""
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), "invalid_request_error")
    for kind in type(error).__mro__:
        if kind in _ANSWERS:
            status, type_, code = _ANSWERS[kind]
            is_soon = kind in (ShuttingDownError, SchedulerRestartingError)
            retry_after_s = 1.0 if is_soon else getattr(error, "retry_after_s", None)
            return ApiError(status, str(error), type_, getattr(error, "param", None), code, retry_after_s)
    bugs.error("a request failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "internal error; see the server's log", "server_error", None, "internal_error")


def install(app: FastAPI, bodies: Mapping[str, type[Body]]) -> None:
    """Answer every error in OpenAI's shape: those of the application and those of the framework.

    Args:
        bodies: by path, of routes that are installed apart.
    """
    bodies = _BODIES | dict(bodies)

    async def handle(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def handle_invalid_body(request: Request, error: RequestValidationError) -> Response:
        path = request.url.path
        body = RoleRequest if path.startswith("/v1/instances/") else bodies.get(path, CompletionRequest)
        return _validation_error(error, list(body.model_fields)).response()

    async def handle_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; only logs show it

    app.add_exception_handler(HBServeError, handle)
    app.exception_handler(RequestValidationError)(handle_invalid_body)
    app.add_exception_handler(ClientGone, handle_client_gone)
    app.add_exception_handler(ClientDisconnect, handle_client_gone)  # amid its body
    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(Exception, handle)


def _validation_error(error: RequestValidationError, known: list[str]) -> ApiError:
    """Return the first error of a body; ``known`` are its parameters."""
    errors = error.errors()
    # A value that may be of several types has an error of each. The one that got furthest is of the type that is meant.
    first = max([one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]], key=lambda one: len(one["loc"]))
    _, *names = first["loc"]  # the first part is "body"
    is_unknown = first["type"] == "extra_forbidden"
    path = [str(name) for index, name in enumerate(names) if not index or is_unknown or not _is_type(name)]
    param = None if first["type"] == "json_invalid" else ".".join(path) or None
    match first["type"]:
        case "json_invalid":
            message = f"the body is not valid JSON: {first['ctx']['error']}"
        case "string_unicode" if param is None:
            message = "a parameter's name contains a lone surrogate, which is not a character"
        case _ if param is None:
            message = "the body must be a JSON object, with Content-Type: application/json"
        case "extra_forbidden" if len(path) == 1 and (reason := unsupported(path[0])) is not None:
            message = reason
        case "extra_forbidden":
            message = f"unknown parameter {param!r}{nearest(path[0], known) if len(path) == 1 else ''}"
        case "missing":
            message = f"missing required parameter {param!r}"
        case _:
            message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
    return ApiError(400, message, "invalid_request_error", param)


def _is_type(part: int | str) -> bool:
    """Whether a part of an error's path is no parameter but the type that a value was compared with."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)

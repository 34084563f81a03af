"""The HTTP application: routes, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from hbserve.config import InstanceRole, ServerConfig
from hbserve.errors import EngineDeadError, InvalidRequestError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.server import errors
from hbserve.server.chat import ChatCompletion
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.completions import Completion
from hbserve.server.generation import Deadline
from hbserve.server.prometheus import render
from hbserve.server.protocol import CompletionRequest, DetokenizeRequest, RoleRequest, TokenizeRequest

STATS_TIMEOUT_S = 5.0
_DEFAULTS = ServerConfig()


def create_app(
    engine: TextEngine,
    client: EngineClient,
    served_name: str,
    config: ServerConfig = _DEFAULTS,
    rotations: Callable[[], dict[str, dict[str, Any]]] = dict,
) -> FastAPI:
    """The OpenAI-compatible application over one engine.

    Args:
        client: of the same engine; asked for the system's health and statistics.
        served_name: the model's name, which requests must give.
        config: of which only what concerns a single request is used here; see `hbserve.server.guard`.
        rotations: for the metrics, counts of each ``semi_pd`` instance; see `hbserve.server.prometheus.render`.
    """
    app = FastAPI(
        title="HBServe",
        description="OpenAI-compatible completions and chat completions.",
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
    )
    errors.install(app)
    model = {
        "id": served_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "hbserve",
        "max_model_len": engine.max_model_len,
    }

    def check_model(name: str) -> None:
        if name != served_name:
            raise errors.ModelNotFoundError(f"there is no model {name!r}; this server has {served_name!r}", "model")

    def deadline_of(request: Request) -> Deadline:
        deadline: Deadline | None = request.scope.get("deadline")  # the guard's, from before the wait for a turn
        return deadline or Deadline(config.request_timeout_s)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        return await Completion(engine, body, deadline_of(request)).respond(request.receive)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model)
        chat = await ChatCompletion.create(engine, body, deadline_of(request))
        return await chat.respond(request.receive)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", "prompt")
        if body.prompt is not None:
            tokens = await engine.text.encode(body.prompt, body.add_special_tokens)
        else:
            tokens = await engine.text.encode_chat(body.messages or [])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            check_model(body.model)
        engine.check_token_ids(body.tokens, "tokens")
        decode = partial(engine.tokenizer.decode, skip_special_tokens=False)
        return {"prompt": await asyncio.to_thread(decode, body.tokens)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_by_name(name: str) -> dict[str, Any]:
        check_model(name)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            if engine.text.dead is not None:
                raise engine.text.dead
            report = _health(await client.stats(STATS_TIMEOUT_S))
        except EngineDeadError as error:
            report = {"status": "dead", "reason": str(error)}
        return JSONResponse(report, 200 if report["status"] in ("ready", "degraded") else 503)

    @app.get("/ready")
    async def is_ready() -> JSONResponse:
        """Whether to send work here: for load balancers. See `Guard` for the end of a server."""
        return await health()

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """The operator's view: counts, instances and links; see `hbserve.scheduler.stats.SystemStats`."""
        return await client.stats(STATS_TIMEOUT_S)

    @app.post("/v1/instances/{instance_id}/role")
    async def set_role(instance_id: str, body: RoleRequest) -> dict[str, Any]:
        """Have an instance change between prefill and decode; answers when it has."""
        await client.set_role(instance_id, InstanceRole(body.role), body.timeout_s)
        return {"instance_id": instance_id, "role": body.role}

    @app.delete("/v1/instances/{instance_id}")
    async def remove_instance(instance_id: str, timeout_s: Annotated[float, Query(gt=0)] = 120.0) -> dict[str, Any]:
        """Have an instance finish its requests and end; answers when it has."""
        await client.remove_instance(instance_id, timeout_s)
        return {"instance_id": instance_id, "removed": True}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        stats = await client.stats(STATS_TIMEOUT_S)
        document, content_type = render(stats, request.headers.get("Accept", ""), rotations())
        return Response(document, media_type=content_type)

    return app


def _health(stats: dict[str, Any]) -> dict[str, Any]:
    """``ready``: every instance is there; ``degraded``: enough to serve; else ``starting``, also after a loss."""
    instances: dict[str, dict[str, Any]] = stats["gpu_instances"]
    missing = {name: one.get("why_lost", "") for name, one in instances.items() if one["status"] != "ready"}
    roles = [InstanceRole(one["role"]) for one in instances.values() if one["status"] == "ready"]
    serves = any(role.prefills for role in roles) and any(role.decodes for role in roles)
    if not missing:
        return {"status": "ready"}
    if serves:
        return {"status": "degraded", "missing": missing}
    return {"status": "starting", "reason": f"waiting for {', '.join(missing)}", "missing": missing}

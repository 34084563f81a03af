"""The routes of the HTTP application.

The path of one chat request. The API server (process ``hbserve-api``) does everything in one event loop of its main
thread, except where another process is named:

1. `http_protocol.HttpProtocol` reads the request from the socket, and starts the ASGI application as a task.
2. `guard.Guard` checks key and limits, sets the deadline, and waits in `fair_gate.FairGate` for the key's turn.
3. ``chat_completions`` below gets the body as a `chat_protocol.ChatCompletionRequest`, which pydantic has validated.
4. `chat.ChatCompletion.create` makes the sampling parameters, and asks `frontend/text_pool.py` for token ids.
   The process ``hbserve-tokenizer-0`` (or a later one) applies the chat template and encodes.
5. `generation.Generation.respond` opens the request with ``TextEngine.open`` (`frontend/text_engine.py`), which makes
   one ``AddRequest`` per sample. `frontend/engine_client.py` sends them to the scheduler over ZeroMQ.
6. The process ``hbserve-scheduler`` validates them (`scheduler/clients.py`), and plans steps until they are finished.
   It sends the new tokens of each step back in an ``OutputBatch``, first tokens in one ahead of it.
7. `frontend/engine_client.py` receives the batch. `frontend/text_engine.py` passes the tokens to the process
   ``hbserve-detokenizer``, gets their text back, and puts both into a `TextStream`.
8. `generation.Generation` reads the stream, ``ChatCompletion`` writes chunks, and `connection.EventStream` sends them;
   without ``stream`` it collects all deltas first and answers once.
9. If the client disconnects, `connection.while_connected` cancels the task. Closing the `TextStream` then sends an
   ``AbortRequest`` to the scheduler.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hbserve import __version__
from hbserve.config import InstanceRole, ServerConfig
from hbserve.errors import EngineDeadError, InvalidRequestError, SchedulerRestartingError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.base import MAX_SECONDS
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.server import errors, semi_pd_routes
from hbserve.server.bodies.json_route import beside_loop, json_route
from hbserve.server.chat import ChatCompletion
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.completions import Completion
from hbserve.server.connection import AnswerHead
from hbserve.server.generation import Deadline
from hbserve.server.prometheus import render
from hbserve.server.protocol import CompletionRequest, DetokenizeRequest, PlanRequest, RoleRequest, TokenizeRequest
from hbserve.server.responses import routes as response_routes
from hbserve.server.responses.body import ResponsesRequest
from hbserve.system.running_plan import RunningPlan

STATS_TIMEOUT_S = 5.0
_DEFAULTS = ServerConfig()
_NO_PLAN = "this server does not know what its system was planned for"


def create_app(
    engine: TextEngine,
    client: EngineClient,
    served_name: str,
    config: ServerConfig = _DEFAULTS,
    supervisors: Mapping[str, ProcessRotationManager] = MappingProxyType({}),
    running: RunningPlan | None = None,
) -> FastAPI:
    """Make the OpenAI-compatible application over one engine.

    Args:
        client: the same engine's client, for the system's health and statistics.
        served_name: the model's name, which requests must give.
        config: only ``request_timeout_s`` is used here; `hbserve.server.guard` applies the rest.
        supervisors: rotation managers of the system's ``semi_pd`` instances, by name.
        running: what the system consists of, and why, for ``/v1/plan``.
    """
    app = FastAPI(
        title="HBServe",
        description="OpenAI-compatible completions and chat completions.",
        docs_url=None,  # FastAPI's own pages load their scripts from other hosts
        redoc_url=None,
    )
    app.router.route_class = json_route(engine)
    errors.install(app, {"/v1/responses": ResponsesRequest, "/v1/plan": PlanRequest})
    app.add_middleware(AnswerHead)
    semi_pd_routes.install(app, supervisors)
    model = {
        "id": served_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "hbserve",
        "max_model_len": engine.max_model_len,
        **client.formats,
    }

    def check_model(name: str | None) -> None:
        if name not in (None, "", served_name):
            raise errors.ModelNotFoundError(f"there is no model {name!r}; this server has {served_name!r}", "model")

    def deadline_of(request: Request) -> Deadline:
        deadline: Deadline | None = request.scope.get("deadline")  # set by the guard, before the wait for a turn
        return deadline or Deadline(config.request_timeout_s)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        body.model = served_name
        completion = await Completion.create(engine, body, deadline_of(request))
        return await completion.respond(request.receive)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model)
        body.model = served_name
        chat = await ChatCompletion.create(engine, body, deadline_of(request))
        return await chat.respond(request.receive)

    response_routes.install(app, engine, served_name, check_model, deadline_of)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", "prompt")
        if body.prompt is not None:
            tokens = await engine.text.encode(body.prompt, body.add_special_tokens)
        else:
            tools, options = await beside_loop(engine, body, lambda: (body.offered_tools, body.chat_options()))
            tokens = await engine.text.encode_chat(body.messages, tools, options, body.is_light)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len}
        return Response(msgspec.json.encode(answer), media_type="application/json")  # FastAPI takes 1 µs per token

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        engine.check_token_ids(body.tokens, "tokens")
        return {"prompt": await engine.text.decode(body.tokens, skip_special_tokens=False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Return the tokenizer's configuration, with its class and its chat template."""
        if not engine.tokenizer.has_text:
            raise HTTPException(404, "the model has no tokenizer")
        return await asyncio.to_thread(engine.tokenizer.describe)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/v1/models/")
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_by_name(name: str) -> dict[str, Any]:
        check_model(name)
        return model

    @app.get("/health")
    @app.get("/ready")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> JSONResponse:
        """Report whether the system can serve. While the server ends, `Guard` answers 503 on ``/ready`` instead."""
        try:
            if engine.text.dead is not None:
                raise engine.text.dead
            if client.restarting is not None:
                raise SchedulerRestartingError(client.restarting)
            report = _with_text(_health(await client.stats(STATS_TIMEOUT_S)), engine.text.missing)
        except EngineDeadError as error:
            report = {"status": "dead", "reason": str(error)}
        except SchedulerRestartingError as error:
            report = {"status": "restarting", "reason": str(error)}
        return JSONResponse(report, 200 if report["status"] in ("ready", "degraded") else 503)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """Return counts, instances and links; see `hbserve.scheduler.stats.SystemStats`."""
        return await client.stats(STATS_TIMEOUT_S)

    @app.get("/v1/plan")
    async def system_plan() -> dict[str, Any]:
        """Return mode, instances and targets, why they were chosen, and what else was predicted."""
        if running is None:
            raise HTTPException(404, _NO_PLAN)
        stats = await client.stats(STATS_TIMEOUT_S)
        document: dict[str, Any] = msgspec.to_builtins(running.update(stats))
        if running.plan.learnt_profile is not None:
            document["learning"] = stats.get("profile")
        return document

    @app.post("/v1/plan")
    async def change_plan(body: PlanRequest) -> dict[str, Any]:
        """Change the roles of all instances to those of another system; answer with the plan when they have changed."""
        if running is None:
            raise HTTPException(404, _NO_PLAN)
        document: dict[str, Any] = msgspec.to_builtins(await running.change_to(body.system, body.timeout_s))
        return document

    @app.post("/v1/instances/{instance_id}/role")
    async def set_role(instance_id: str, body: RoleRequest) -> dict[str, Any]:
        """Change an instance's role between prefill, decode and unified; answer when it is changed."""
        await client.set_role(instance_id, InstanceRole(body.role), body.timeout_s)
        return {"instance_id": instance_id, "role": body.role}

    @app.delete("/v1/instances/{instance_id}")
    async def remove_instance(
        instance_id: str, timeout_s: Annotated[float, Query(gt=0, le=MAX_SECONDS)] = 120.0
    ) -> dict[str, Any]:
        """Let an instance finish its requests and end; answer when it has ended."""
        await client.remove_instance(instance_id, timeout_s)
        return {"instance_id": instance_id, "removed": True}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        stats = await client.stats(STATS_TIMEOUT_S)
        rotations = semi_pd_routes.rotation_counts(supervisors)
        document, content_type = render(stats, request.headers.get("Accept", ""), rotations)
        return Response(document, media_type=content_type)

    return app


def _with_text(report: dict[str, Any], missing: Sequence[str]) -> dict[str, Any]:
    """Add to the state the text processes that are being replaced: without one of them some requests have to wait."""
    if not missing or report["status"] not in ("ready", "degraded"):
        return report
    reasons = {name: "being replaced" for name in missing}
    names = ", ".join(missing)
    return {"status": "starting", "reason": f"waiting for {names}", "missing": report.get("missing", {}) | reasons}


def _health(stats: dict[str, Any]) -> dict[str, Any]:
    """Return the state: ``ready`` with all instances, ``degraded`` with enough to serve, else ``starting``."""
    instances: dict[str, dict[str, Any]] = stats["gpu_instances"]
    missing = {
        name: instance.get("why_lost", "") for name, instance in instances.items() if instance["status"] != "ready"
    }
    roles = [InstanceRole(instance["role"]) for instance in instances.values() if instance["status"] == "ready"]
    if any(role.prefills for role in roles) and any(role.decodes for role in roles):
        return {"status": "degraded", "missing": missing} if missing else {"status": "ready"}
    names = ", ".join(missing) or "an instance of a phase that none is left for"
    return {"status": "starting", "reason": f"waiting for {names}", "missing": missing}

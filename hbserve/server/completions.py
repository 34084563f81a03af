"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve.pd_disagg.text_engine import TextEngine
from hbserve.server.connection import EventStream, while_connected
from hbserve.server.generation import Generation
from hbserve.server.logprobs import CompletionLogprobs
from hbserve.server.protocol import CompletionRequest


async def create_completion(engine: TextEngine, body: CompletionRequest, receive: Receive) -> Response:
    """Answer one request, streamed or whole.

    Raises:
        InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, ClientGone
    """
    sampling = body.sampling()
    head: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    generation = Generation(engine, head["id"], body.prompts, sampling)
    logprobs = [
        CompletionLogprobs(engine.tokenizer, sampling.skip_special_tokens) for _ in range(generation.num_choices)
    ]
    if body.stream:
        return EventStream(_events(generation, head, logprobs, body.include_usage))
    samples = await while_connected(receive, generation.collect())
    choices = [
        {
            "index": sample.index,
            "text": sample.text,
            "logprobs": sample.logprobs and logprobs[sample.index].add(sample.token_ids, sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        for sample in samples
    ]
    answer = msgspec.json.encode(head | {"choices": choices, "usage": generation.usage()})
    return Response(answer, media_type="application/json")


async def _events(
    generation: Generation, head: dict[str, Any], logprobs: list[CompletionLogprobs], include_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    if include_usage:
        head = head | {"usage": None}
    async with aclosing(generation.stream()) as deltas:
        async for number, delta in deltas:
            if not delta.text and delta.finish_reason is None and not delta.logprobs:
                continue
            choice = {
                "index": number,
                "text": delta.text,
                "logprobs": delta.logprobs and logprobs[number].add(delta.token_ids, delta.logprobs),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            yield head | {"choices": [choice]}
    if include_usage:
        yield head | {"choices": [], "usage": generation.usage()}

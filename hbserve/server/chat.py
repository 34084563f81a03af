"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve.errors import InvalidRequestError
from hbserve.pd_disagg.text_engine import TextEngine
from hbserve.server.connection import EventStream, while_connected
from hbserve.server.generation import Generation
from hbserve.server.logprobs import chat_logprobs
from hbserve.server.protocol import ChatCompletionRequest
from hbserve.tokenizer import Tokenizer


async def create_chat_completion(engine: TextEngine, body: ChatCompletionRequest, receive: Receive) -> Response:
    """Answer one request, streamed or whole.

    Raises:
        InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, ClientGone
    """
    sampling = body.sampling()
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": body.model,
    }
    prompt = await engine.encode_chat(body.conversation)
    generation = Generation(engine, head["id"], [prompt], sampling)
    if body.stream:
        return EventStream(_events(generation, head, engine.tokenizer, body))
    with _named_as_in(body):
        samples = await while_connected(receive, generation.collect())
    choices = [
        {
            "index": sample.index,
            "message": {"role": "assistant", "content": sample.text},
            "logprobs": sample.logprobs and chat_logprobs(engine.tokenizer, sample.token_ids, sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        for sample in samples
    ]
    answer = msgspec.json.encode(head | {"choices": choices, "usage": generation.usage()})
    return Response(answer, media_type="application/json")


async def _events(
    generation: Generation, head: dict[str, Any], tokenizer: Tokenizer, body: ChatCompletionRequest
) -> AsyncGenerator[dict[str, Any]]:
    if body.include_usage:
        head = head | {"usage": None}
    begun: set[int] = set()
    with _named_as_in(body):
        async with aclosing(generation.stream()) as deltas:
            async for number, delta in deltas:
                if number not in begun:
                    begun.add(number)
                    yield head | {"choices": [_choice(number, {"role": "assistant", "content": ""})]}
                if not delta.text and delta.finish_reason is None and not delta.logprobs:
                    continue
                choice = _choice(number, {"content": delta.text} if delta.text else {})
                if delta.logprobs:
                    choice["logprobs"] = chat_logprobs(tokenizer, delta.token_ids, delta.logprobs)
                if delta.finish_reason is not None:
                    choice |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
                yield head | {"choices": [choice]}
    if body.include_usage:
        yield head | {"choices": [], "usage": generation.usage()}


def _choice(number: int, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


@contextmanager
def _named_as_in(body: ChatCompletionRequest) -> Iterator[None]:
    """Errors of the engine name its own parameters; rename them to those that the body has."""
    names = {"prompt": "messages"}
    if body.max_tokens is None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), names.get(error.param or "", error.param)) from error

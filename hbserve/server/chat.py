"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve.errors import InvalidRequestError
from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.connection import EventStream, while_connected
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import chat_logprobs
from hbserve.server.tool_calls import ToolCallParser
from hbserve.server.tool_formats import tool_format


async def create_chat_completion(
    engine: TextEngine, body: ChatCompletionRequest, receive: Receive, deadline: Deadline
) -> Response:
    """Answer one request, streamed or whole.

    Args:
        deadline: then it ends with an error.

    Raises:
        InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, ClientGone
    """
    sampling = body.sampling(tool_format(engine.tokenizer.tools_template), engine.tokenizer.added_token_id)
    async with deadline.applied():
        prompt = await engine.text.encode_chat(body.conversation(), body.offered_tools, body.chat_template_kwargs)
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": body.model,
    }
    generation = Generation(engine, head["id"], [prompt], sampling, deadline)
    if body.stream:
        return EventStream(_events(engine, generation, head, body))
    with _named_as_in(body):
        samples = await while_connected(receive, generation.collect())
    choices = [_choice(engine, sample, _parser(engine, body)) for sample in samples]
    answer = msgspec.json.encode(head | {"choices": choices, "usage": generation.usage()})
    return Response(answer, media_type="application/json")


def _parser(engine: TextEngine, body: ChatCompletionRequest) -> ToolCallParser | None:
    """For one output, which may have calls; None: it cannot."""
    form = tool_format(engine.tokenizer.tools_template)
    if not body.offered_tools or form is None:
        return None
    names = {tool.function.name for tool in body.tools or ()}
    return ToolCallParser(form, names, forced=body.forces_calls, only_one=body.parallel_tool_calls is False)


def _choice(engine: TextEngine, sample: Sample, parser: ToolCallParser | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text}
    finish_reason = sample.finish_reason
    if parser is not None:
        text, calls = parser.feed(sample.text, last=True)  # all at once: every call is whole
        message["content"] = text if text or not calls else None
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
    return {
        "index": sample.index,
        "message": message,
        "logprobs": sample.logprobs and chat_logprobs(engine.tokenizer, sample.token_ids, sample.logprobs),
        "finish_reason": finish_reason,
        "stop_reason": sample.stop_reason,
    }


async def _events(
    engine: TextEngine, generation: Generation, head: dict[str, Any], body: ChatCompletionRequest
) -> AsyncGenerator[list[dict[str, Any]]]:
    if body.include_usage:
        head = head | {"usage": None}
    begun: set[int] = set()
    parsers = [_parser(engine, body) for _ in range(generation.num_choices)]
    try:
        with _named_as_in(body):
            while deltas := await generation.read():
                chunks = []
                for delta in deltas:
                    if delta.index not in begun:
                        begun.add(delta.index)
                        choice = _chunk_choice(delta.index, {"role": "assistant", "content": ""})
                        chunks.append(head | {"choices": [choice]})
                    grown = _grown(engine, delta, parsers[delta.index])
                    if grown is not None:
                        chunks.append(head | {"choices": [grown]})
                if body.continuous_usage:
                    for chunk in chunks:
                        chunk["usage"] = generation.usage()
                if chunks:
                    yield chunks
        if body.include_usage:
            yield [head | {"choices": [], "usage": generation.usage()}]
    finally:
        generation.close()


def _grown(engine: TextEngine, delta: SampleDelta, parser: ToolCallParser | None) -> dict[str, Any] | None:
    """The choice of a chunk, or None where there is nothing to tell yet."""
    text, finish_reason = delta.text, delta.finish_reason
    calls: list[dict[str, Any]] = []
    if parser is not None:
        text, calls = parser.feed(text, last=finish_reason is not None)
        if finish_reason == "stop" and parser.num_calls:
            finish_reason = "tool_calls"
    if not text and not calls and finish_reason is None and not delta.logprobs:
        return None
    content: dict[str, Any] = {"content": text} if text else {}
    if calls:
        content["tool_calls"] = calls
    choice = _chunk_choice(delta.index, content)
    if delta.logprobs:
        choice["logprobs"] = chat_logprobs(engine.tokenizer, delta.token_ids, delta.logprobs)
    if finish_reason is not None:
        choice |= {"finish_reason": finish_reason, "stop_reason": delta.stop_reason}
    return choice


def _chunk_choice(number: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


@contextmanager
def _named_as_in(body: ChatCompletionRequest) -> Iterator[None]:
    """Errors of the engine name its own parameters; rename them to those that the body has."""
    names = {"prompt": "messages"}
    if body.max_tokens is None:
        names["max_tokens"] = "max_completion_tokens"
    if body.grammar is None:
        names["grammar"] = "tool_choice" if body.response_format is None else "response_format"
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(str(error), names.get(error.param or "", error.param)) from error

"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.server.connection import EventStream, while_connected
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import CompletionLogprobs
from hbserve.server.protocol import CompletionRequest


async def create_completion(
    engine: TextEngine, body: CompletionRequest, receive: Receive, deadline: Deadline
) -> Response:
    """Answer one request, streamed or whole.

    Args:
        deadline: then it ends with an error.

    Raises:
        InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, ClientGone
    """
    return await _Completion(engine, body, deadline).respond(receive)


class _Completion:
    def __init__(self, engine: TextEngine, body: CompletionRequest, deadline: Deadline) -> None:
        self._engine, self._body = engine, body
        self._sampling = body.sampling()
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._generation = Generation(engine, self._head["id"], body.prompts, self._sampling, deadline)
        self._logprobs = [
            CompletionLogprobs(engine.tokenizer, self._sampling.skip_special_tokens)
            for _ in range(self._generation.num_choices if self._sampling.logprobs is not None else 0)
        ]

    async def respond(self, receive: Receive) -> Response:
        if self._body.stream:
            return EventStream(self._events())
        samples = await while_connected(receive, self._generation.collect())
        choices = [self._choice(sample, self._prompt_text(sample.index) + sample.text) for sample in samples]
        answer = msgspec.json.encode(self._head | {"choices": choices, "usage": self._generation.usage()})
        return Response(answer, media_type="application/json")

    def _choice(self, part: Sample | SampleDelta, text: str) -> dict[str, Any]:
        """A whole choice, or what one has grown by."""
        logprobs = None
        if part.logprobs:
            logprobs = self._logprobs[part.index].add(part.token_ids, part.logprobs)
        return {
            "index": part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def _prompt_text(self, index: int) -> str:
        """What is to be shown of a choice's prompt."""
        if not self._body.echo:
            return ""
        number = index // self._sampling.n
        prompt = self._body.prompts[number]
        if isinstance(prompt, str):
            return prompt
        return self._engine.tokenizer.decode(prompt, skip_special_tokens=self._sampling.skip_special_tokens)

    async def _events(self) -> AsyncGenerator[list[dict[str, Any]]]:
        generation, body = self._generation, self._body
        head = self._head | {"usage": None} if body.include_usage else self._head
        begun: set[int] = set()
        try:
            while deltas := await generation.read():
                chunks = []
                for delta in deltas:
                    text = delta.text
                    if body.echo and delta.index not in begun:
                        begun.add(delta.index)
                        text = self._prompt_text(delta.index) + text
                    if not (text or delta.finish_reason or delta.logprobs or body.continuous_usage):
                        continue
                    chunk = head | {"choices": [self._choice(delta, text)]}
                    if body.continuous_usage:
                        chunk["usage"] = generation.usage()
                    chunks.append(chunk)
                if chunks:
                    yield chunks
            if body.include_usage:
                yield [head | {"choices": [], "usage": generation.usage()}]
        finally:
            generation.close()

"""One request for generated text, from its body to its response: the base of completions and chat completions.

Runs in the API server's process, in its event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve.errors import InvalidRequestError, RequestTimeoutError
from hbserve.frontend.outputs import Sample, SampleDelta, TextStream
from hbserve.frontend.text_engine import Prompt, TextEngine
from hbserve.messages.base import TokenLogprobs
from hbserve.sampling_params import SamplingParams
from hbserve.server.connection import EventStream, while_connected
from hbserve.server.logprobs import prompt_logprobs, with_top
from hbserve.server.protocol import GenerationRequest, StreamOptions


class Deadline:
    """The time at which a request ends with an error.

    Args:
        timeout_s: from now on; None: never.

    Attributes:
        waits_since: when the server has begun to work on the request, on the monotonic clock: its body is whole, and it
            is its key's turn.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.waits_since = time.monotonic()
        self._timeout_s = timeout_s
        self.at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    @property
    def error(self) -> RequestTimeoutError:
        """The error that the client gets."""
        return RequestTimeoutError(f"not finished within {self._timeout_s:g} s (server.request_timeout_s)")

    @asynccontextmanager
    async def applied(self) -> AsyncGenerator[None]:
        """Cancel the enclosed work at the deadline, with a `RequestTimeoutError`."""
        try:
            async with asyncio.timeout_at(self.at):
                yield
        except TimeoutError:
            raise self.error from None


_MANY_CHOICES = 32
"""Choices from which on an answer is written beside the event loop, and read in turns that such requests share."""


class Generation(ABC):
    """One HTTP request's prompts, which run concurrently, and the response to it.

    Choice ``p * n + i`` is sample i of prompt p. Subclasses say how a choice is written.

    Args:
        id_prefix: first part of the response's id; the engine knows the request by the same id.
        object_name: kind of the response.
        deadline: when the request ends with an error.
    """

    param_names: Mapping[str, str] = {}
    """Names in the body of those parameters that the engine's errors call by other names."""

    def __init__(
        self,
        engine: TextEngine,
        body: GenerationRequest,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        deadline: Deadline,
        id_prefix: str,
        object_name: str,
    ) -> None:
        self._engine, self._body, self._prompts, self._sampling = engine, body, prompts, sampling
        self._stream_options = body.stream_options or StreamOptions()
        self._scores_prompt = sampling.prompt_logprobs is not None
        self._may_end_early = False
        self._num_choices = len(prompts) * sampling.n
        self._head: dict[str, Any] = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": body.model,
        }
        self._stream: TextStream | None = None
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._accepted_tokens = self._rejected_tokens = 0
        self._held_scores: list[list[TokenLogprobs]] = [[] for _ in range(self._num_choices)]

    @abstractmethod
    def _choice(self, sample: Sample) -> dict[str, Any]:
        """Write a finished choice."""

    @abstractmethod
    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        """Write the growth of a choice, one entry per chunk of the stream.

        Args:
            is_first: whether the choice begins with it.
        """

    def _head_of_prompt(self) -> dict[str, Any]:
        """Return what the response, or the first chunk of each choice, says of the prompt beside the choices."""
        return {}

    def _is_complete(self, delta: SampleDelta) -> bool:
        """Return whether a choice is complete with this growth, so that it ends here.

        Called once for each growth, if a subclass has set ``_may_end_early``.
        """
        return False

    async def respond(self, receive: Receive) -> Response:
        """Answer the request, streamed or whole.

        Args:
            receive: the connection's ASGI channel, with the body already read.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, ClientGone
        """
        if self._body.stream:
            return EventStream(self._events())
        samples = await while_connected(receive, self._collect())
        # With every token of a long prompt in it, or many choices, an answer takes long to write: other requests must
        # not wait for it.
        is_long = self._scores_prompt or self._num_choices >= _MANY_CHOICES
        answer = await self._engine.text.aside(lambda: self._answer(samples)) if is_long else self._answer(samples)
        return Response(answer, media_type="application/json")

    def _answer(self, samples: list[Sample]) -> bytes:
        choices = [self._choice(sample) for sample in samples]
        return msgspec.json.encode(
            self._head
            | self._head_of_prompt()
            | {"choices": choices, "usage": self._usage()}
            | self._prompt_part(samples[0])
        )

    def _prompt_part(self, sample: Sample) -> dict[str, Any]:
        """Write what a whole answer says of the prompt beside its choices."""
        return {}

    def _prompt_logprobs(self, part: Sample | SampleDelta) -> dict[str, Any]:
        """Write ``prompt_logprobs`` if the client asks for them; ``part`` is a choice, or its first growth."""
        number = self._body.prompt_logprobs
        if number is None:
            return {}
        entries = with_top(part.prompt_logprobs or (), number)
        return {"prompt_logprobs": prompt_logprobs(self._engine.tokenizer, self._prompt_token_ids(part), entries)}

    def _prompt_token_ids(self, part: Sample | SampleDelta) -> list[int]:
        assert self._stream is not None
        return self._stream.prompt_token_ids[part.index // self._sampling.n]

    async def _events(self) -> AsyncGenerator[list[dict[str, Any]]]:
        options = self._stream_options
        head = self._head | {"usage": None} if options.include_usage else self._head
        begun: set[int] = set()
        try:
            while deltas := await self._read():
                chunks = []
                for delta in deltas:
                    is_first = delta.index not in begun
                    if delta.prompt_logprobs:
                        choices = await self._engine.text.aside(partial(self._chunk_choices, delta, is_first))
                    else:
                        choices = self._chunk_choices(delta, is_first)
                    new = [head | {"choices": [choice]} for choice in choices]
                    if is_first:
                        begun.add(delta.index)
                        if new:
                            new[0] |= self._head_of_prompt()
                    chunks += new
                if options.continuous_usage_stats:
                    for chunk in chunks:
                        chunk["usage"] = self._usage()
                if chunks:
                    yield chunks
            if options.include_usage:
                yield [head | {"choices": [], "usage": self._usage()}]
        finally:
            self._close()

    async def _collect(self) -> list[Sample]:
        samples = [Sample(index=index) for index in range(self._num_choices)]
        try:
            while deltas := await self._read():
                for delta in deltas:
                    samples[delta.index].add(delta)
        finally:
            self._close()
        return samples

    async def _read(self) -> list[SampleDelta]:
        """Return the news since the last call; an empty list at the end. The first call starts the request."""
        try:
            if self._stream is None:
                deadline = self._deadline
                async with deadline.applied():
                    self._stream = await self._engine.open(
                        self._prompts, self._sampling, self._head["id"], deadline.waits_since
                    )
                self._prompt_tokens = sum(map(len, self._stream.prompt_token_ids))
                if deadline.at is not None:
                    self._timer = asyncio.get_running_loop().call_at(deadline.at, self._stream.fail, deadline.error)
            elif self._num_choices >= _MANY_CHOICES and self._engine.turn.is_over:
                await self._engine.turn.pass_on()
            deltas = await self._stream.read()
            while self._scores_prompt and deltas and not (deltas := self._with_whole_prompts(deltas)):
                deltas = await self._stream.read()
        except InvalidRequestError as error:
            if (name := self.param_names.get(error.param or "")) is None:
                raise
            message = str(error) if name in str(error) else f"{name}: {error}"
            raise type(error)(message, name) from error
        for number, delta in enumerate(deltas):
            if self._may_end_early and self._is_complete(delta) and delta.finish_reason in (None, "length"):
                self._stream.end_sample(delta.index)
                deltas[number] = msgspec.structs.replace(delta, finish_reason="stop")
            self._completion_tokens += len(delta.token_ids)
            self._accepted_tokens += delta.num_accepted
            self._rejected_tokens += delta.num_rejected
            if delta.index % self._sampling.n == 0:  # the other samples may find the first one's prompt in the cache
                self._cached_tokens += delta.num_cached_tokens
        return deltas

    def _with_whole_prompts(self, deltas: list[SampleDelta]) -> list[SampleDelta]:
        """Hold back log-probabilities of a prompt until all are there; a choice's first growth then has them."""
        ready = []
        for delta in deltas:
            held = self._held_scores[delta.index]
            held += delta.prompt_logprobs or []
            is_whole = len(held) == len(self._prompt_token_ids(delta)) - 1
            if is_whole or delta.finish_reason is not None:  # it may be aborted before
                news = list(held) if delta.prompt_logprobs and is_whole else None
                ready.append(msgspec.structs.replace(delta, prompt_logprobs=news))
        return ready

    def _close(self) -> None:
        """Abort the samples that are still open."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._stream.close()

    def _usage(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object for the tokens read so far; a prompt counts once, for any n."""
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
        details = self._completion_details()
        return usage | ({"completion_tokens_details": details} if details else {})

    def _completion_details(self) -> dict[str, int]:
        """Return what is known of the output's tokens."""
        if self._sampling.prediction is None:
            return {}
        return {
            "accepted_prediction_tokens": self._accepted_tokens,
            "rejected_prediction_tokens": self._rejected_tokens,
        }

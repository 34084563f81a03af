"""One request to POST /v1/responses: a chat completion whose answer is written as a response."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import msgspec
from fastapi import Response
from starlette.types import Receive

from hbserve import bounded_json
from hbserve.errors import InvalidRequestError
from hbserve.frontend.outputs import AT_DEAD_END, Sample
from hbserve.frontend.text_engine import TextEngine
from hbserve.server.bodies.json_route import beside_loop
from hbserve.server.chat import ChatCompletion
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.connection import EventStream
from hbserve.server.errors import PreviousResponseNotFoundError, api_error
from hbserve.server.generation import Deadline
from hbserve.server.logprobs import chat_logprobs
from hbserve.server.responses.body import PARAM_NAMES, ResponsesRequest
from hbserve.server.responses.items import Event, OutputItems, is_reference, resolved
from hbserve.server.responses.store import ResponseStore, StoredResponse, by_id

_STATUSES = {"length": "incomplete", "abort": "cancelled"}
"""Status of a response by the finish reason of its output; for all others it is ``completed``."""


class _Parts(NamedTuple):
    """What a body becomes, in one piece of work.

    Attributes:
        history: items of the responses before.
        input: items of the input by id, if they are to be stored.
        text: form of the answer, as the response repeats it.
    """

    chat: ChatCompletionRequest
    history: list[bytes]
    input: dict[str, bytes]
    text: dict[str, Any]


class ResponseGeneration(ChatCompletion):
    """One response. `begin` makes it."""

    _incomplete_reason = "max_output_tokens"

    _request: ResponsesRequest
    _store: ResponseStore
    _key: str
    _parts: _Parts

    @classmethod
    async def begin(
        cls, engine: TextEngine, request: ResponsesRequest, deadline: Deadline, store: ResponseStore, key: str
    ) -> Self:
        """Check the body, and encode the conversation.

        Args:
            store: has the response that this one continues and the items that it refers to, and gets this one.
            key: name of the client's key.

        Raises:
            PreviousResponseNotFoundError, ItemNotFoundError, InvalidRequestError, RequestTimeoutError, EngineDeadError
        """
        previous: StoredResponse | None = None
        if request.previous_response_id is not None:
            previous = store.get(request.previous_response_id, key)
            if previous is None:
                raise PreviousResponseNotFoundError(
                    f"there is no response {request.previous_response_id!r}: it was made with store: false, or with "
                    "another key, or it was dropped for later ones",
                    "previous_response_id",
                )
            request.is_light = request.is_light and previous.num_bytes <= bounded_json.LIGHT_BYTES
        request.is_light = request.is_light and not any(map(is_reference, request.new_items()))

        def parts() -> _Parts:
            history = [] if previous is None else previous.conversation()
            text = {"format": {"type": "text"}}
            if request.text is not None:
                text |= request.text.model_dump(by_alias=True, exclude_none=True)
            request.input = resolved(request.new_items(), lambda item_id: store.item(item_id, key))
            with _own_names():
                chat = request.as_chat([msgspec.json.decode(item) for item in history])
            return _Parts(chat, history, {} if request.store is False else by_id(request.input), text)

        made = await beside_loop(engine, request, parts)
        made.chat.is_light = request.is_light
        with _own_names():
            response = await cls.create(engine, made.chat, deadline)
        names = {name: PARAM_NAMES.get(given, given) for name, given in response.param_names.items()}
        response.param_names = PARAM_NAMES | names
        response._head["id"] = f"resp_{uuid.uuid4().hex}"
        response._request, response._store, response._key, response._parts = request, store, key, made
        return response

    async def respond(self, receive: Receive) -> Response:
        """Answer the request, streamed or whole. Errors as in `Generation.respond`."""
        if self._body.stream:
            return EventStream(self._events(), has_names=True)
        return await super().respond(receive)

    def _answer(self, samples: list[Sample]) -> bytes:
        (sample,) = samples
        output = OutputItems()
        new = self._parse(sample)
        output.add(new, self._text_logprobs(sample.token_ids, sample.logprobs))
        status, _ = self._end(output, new.finish_reason or "stop", sample.stop_reason)
        return msgspec.json.encode(self._finish(output, status))

    async def _events(self) -> AsyncGenerator[list[Event]]:
        numbers = itertools.count()

        def numbered(events: list[Event]) -> list[Event]:
            return [event | {"sequence_number": next(numbers)} for event in events]

        output = OutputItems()
        has_begun = False
        try:
            while deltas := await self._read():
                events: list[Event] = []
                if not has_begun:
                    begun = self._snapshot("in_progress", [])
                    events += [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
                    has_begun = True
                for delta in deltas:
                    new = self._parse(delta)
                    events += output.add(new, self._text_logprobs(delta.token_ids, delta.logprobs))
                    if new.finish_reason is not None:
                        status, ends = self._end(output, new.finish_reason, delta.stop_reason)
                        kind = "completed" if status == "completed" else "incomplete"
                        events += [*ends, {"type": f"response.{kind}", "response": self._finish(output, status)}]
                if events:
                    yield numbered(events)
        except Exception as error:
            if not has_begun:
                raise
            told = api_error(error)
            output.end("incomplete")
            failed = self._snapshot("failed", output.items)
            failed["error"] = {"code": "server_error", "message": told.message}
            yield numbered([{"type": "response.failed", "response": failed}])
        finally:
            self._close()

    def _text_logprobs(self, token_ids: list[int], logprobs: Any) -> list[dict[str, Any]]:
        if not logprobs:
            return []
        content: list[dict[str, Any]] = chat_logprobs(self._engine.tokenizer, token_ids, logprobs)["content"]
        return content

    def _end(self, output: OutputItems, finish_reason: str, stop_reason: str | int | None) -> tuple[str, list[Event]]:
        """End the output; return the status of the response, and the events."""
        if stop_reason == AT_DEAD_END:
            self._incomplete_reason = AT_DEAD_END
        status = _STATUSES.get(finish_reason, "completed")
        return status, output.end("completed" if status == "completed" else "incomplete")

    def _finish(self, output: OutputItems, status: str) -> dict[str, Any]:
        """Return the finished response, and store it."""
        response = self._snapshot(status, output.items)
        if self._request.store is not False:
            parts = self._parts
            stored = StoredResponse(
                self._key, msgspec.json.encode(response), parts.history, parts.input, by_id(output.items)
            )
            self._store.put(response["id"], stored)
        return response

    def _snapshot(self, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the response as it is now."""
        request, sampling = self._request, self._sampling
        return {
            "id": self._head["id"],
            "object": "response",
            "created_at": self._head["created"],
            "completed_at": None if status == "in_progress" else int(time.time()),
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": self._incomplete_reason} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._head["model"],
            "output": items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": sampling.temperature,
            "text": self._parts.text,
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._response_usage(),
            "user": request.user,
            "metadata": request.metadata or {},
        }

    def _response_usage(self) -> dict[str, Any]:
        usage = self._usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0} | usage.get("completion_tokens_details", {}),
            "total_tokens": usage["total_tokens"],
        }


@contextmanager
def _own_names() -> Generator[None]:
    """Name parameters in errors as this route does, where chat completions call them otherwise."""
    try:
        yield
    except InvalidRequestError as error:
        name = (error.param or "").split(".")[0]
        if name not in PARAM_NAMES:
            raise
        raise type(error)(str(error).replace(name, PARAM_NAMES[name]), PARAM_NAMES[name]) from error

"""Requests whose right answers are known: an undisturbed system has given them before."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.chaos.service import MODEL, Service

DEADLINE_S = 120.0
"""Time in which every request must have ended, whatever happens to the system meanwhile."""
_TIMEOUT = aiohttp.ClientTimeout(total=DEADLINE_S)
_WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "log", "one", "two", "three", "héllo", "wörld", "你好世界"]
_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
    },
    "required": ["colour", "number", "flags"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """A request.

    Attributes:
        kind: what is asked, in a word.
    """

    kind: str
    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """What a client has got.

    Attributes:
        texts: by index of the choice.
        ends: finish reasons by index of the choice.
        num_tokens: of all choices, from the usage.
        error: ``STATUS CODE`` if the server has answered with an error, ``event CODE`` if it did so in a stream; or
            what the client saw: ``no answer`` (no connection, or one that ended before the answer), ``broken off``,
            ``hung``, ``unreadable: …``.
    """

    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    num_tokens: int | None = None
    error: str | None = None

    def begins(self, whole: Answer) -> bool:
        """Return whether this is the beginning of an answer."""
        return all(whole.texts.get(index, "").startswith(text) for index, text in self.texts.items())


def questions(chance: random.Random, count: int) -> list[Question]:
    """Make questions of every kind in turn."""
    kinds = [_greedy, _chat, _seeded, _json, _several, _stopped, _penalised, _response]
    return [kinds[number % len(kinds)](chance) for number in range(count)]


def _text(chance: random.Random, most: int = 60) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.randint(1, most)))


def _completion(kind: str, chance: random.Random, **more: Any) -> Question:
    body = {"model": MODEL, "prompt": _text(chance), "max_tokens": chance.randint(20, 300), "ignore_eos": True}
    body |= {"skip_special_tokens": False, **more}
    if chance.random() < 0.7:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Question(kind, "/v1/completions", body)


def _conversation(kind: str, chance: random.Random, **more: Any) -> Question:
    roles = ["user", "assistant"] * chance.randint(0, 2) + ["user"]
    messages = [{"role": role, "content": _text(chance, 20)} for role in roles]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": chance.randint(20, 200), **more}
    if chance.random() < 0.7:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Question(kind, "/v1/chat/completions", body)


def _greedy(chance: random.Random) -> Question:
    return _completion("greedy", chance, temperature=0)


def _chat(chance: random.Random) -> Question:
    return _conversation("chat", chance, ignore_eos=True)


def _seeded(chance: random.Random) -> Question:
    return _completion("seeded", chance, temperature=1.1, top_p=0.95, seed=chance.randrange(1 << 30))


def _json(chance: random.Random) -> Question:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
    return _conversation("structured", chance, response_format=form, max_tokens=120)


def _several(chance: random.Random) -> Question:
    return _completion("several samples", chance, n=3, temperature=0.9, seed=chance.randrange(1 << 30))


def _stopped(chance: random.Random) -> Question:
    return _completion("stop string", chance, temperature=0, stop=[chance.choice("aeiost"), "zq"], min_tokens=10)


def _penalised(chance: random.Random) -> Question:
    return _completion("penalties", chance, temperature=0, repetition_penalty=1.3, presence_penalty=0.5)


def _response(chance: random.Random) -> Question:
    body = {"model": MODEL, "input": _text(chance), "temperature": 0, "max_output_tokens": chance.randint(20, 200)}
    return Question("response", "/v1/responses", {**body, "ignore_eos": True, "store": False})


async def ask(
    session: aiohttp.ClientSession,
    service: Service,
    question: Question,
    on_chunk: Callable[[], object] = lambda: None,
    leave_after: int | None = None,
) -> Answer:
    """Send a question and read its answer.

    Args:
        on_chunk: called with each event of a stream.
        leave_after: close the connection after so many events.
    """
    answer = Answer()
    has_begun = False
    try:
        async with session.post(service.url + question.path, json=question.body, timeout=_TIMEOUT) as response:
            has_begun = True
            if response.status != 200:
                document = json.loads(await response.read())
                answer.error = f"{response.status} {document['error']['code']}"
            elif question.body.get("stream"):
                await _read_stream(response, answer, on_chunk, leave_after)
            else:
                _take_document(json.loads(await response.read()), answer)
    except TimeoutError:
        answer.error = "hung"
    except (aiohttp.ClientError, ConnectionError):
        answer.error = "broken off" if has_begun else "no answer"
    except (ValueError, KeyError, TypeError) as error:
        answer.error = f"unreadable: {error!r}"
    return answer


async def _read_stream(
    response: aiohttp.ClientResponse, answer: Answer, on_chunk: Callable[[], object], leave_after: int | None
) -> None:
    num_events = 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        on_chunk()
        if line == b"data: [DONE]\n":
            return
        document = json.loads(line[6:])
        if "error" in document:
            answer.error = f"event {document['error']['code']}"
            return
        for choice in document["choices"]:
            index = choice["index"]
            new = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            answer.texts[index] = answer.texts.get(index, "") + new
            if choice["finish_reason"] is not None:
                answer.ends[index] = choice["finish_reason"]
        if document.get("usage"):
            answer.num_tokens = document["usage"]["completion_tokens"]
        num_events += 1
        if num_events == leave_after:
            answer.error = "left"
            return
    answer.error = "broken off"


def _take_document(document: dict[str, Any], answer: Answer) -> None:
    if document["object"] == "response":
        if document.get("error"):
            answer.error = f"event {document['error']['code']}"
        parts = [part for item in document["output"] for part in item.get("content") or []]
        answer.texts[0] = "".join(part["text"] for part in parts)
        answer.ends[0] = document["status"]
        answer.num_tokens = document["usage"]["output_tokens"]
        return
    for choice in document["choices"]:
        answer.texts[choice["index"]] = choice["text"] if "text" in choice else choice["message"]["content"]
        answer.ends[choice["index"]] = choice["finish_reason"]
    answer.num_tokens = document["usage"]["completion_tokens"]


async def right_answers(service: Service, asked: list[Question], at_once: int = 4) -> list[Answer]:
    """Ask an undisturbed system.

    Raises:
        ChaosError: if one is not answered.
    """
    from benchmarks.chaos.campaign import ChaosError

    room = asyncio.Semaphore(at_once)

    async def one(session: aiohttp.ClientSession, question: Question) -> Answer:
        async with room:
            return await ask(session, service, question)

    async with new_session() as session:
        answers: list[Answer] = await _all([one(session, question) for question in asked])
    for question, answer in zip(asked, answers, strict=True):
        if answer.error is not None:
            raise ChaosError(f"the undisturbed system answers {question} by {answer.error}")
    return answers


async def _all(work: list[Awaitable[Answer]]) -> list[Answer]:
    return list(await asyncio.gather(*work))


def new_session() -> aiohttp.ClientSession:
    """Return a client without limits, which uses each connection once: a descriptor that stays open then is a leak."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

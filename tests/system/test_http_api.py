"""The HTTP API from the client's side: uvicorn on a loopback port, OpenAI's client, raw requests."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hbserve.config import ServerConfig
from hbserve.errors import StartupError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.server import create_app, serve
from hbserve.server.serve import bind
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import assert_no_leaks, greedy_reference
from tests.support.http_server import MODEL, USER, letters
from tests.support.model_zoo import save_model
from tests.support.scripted_scheduler import DEADLINE_S, Script, ScriptedScheduler, fails, output, tokens


def events(body: str) -> list[Any]:
    """Return the documents of an event stream, with ``[DONE]`` as text."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def endless(request: AddRequest) -> AsyncIterator[RequestOutput]:
    """Send one token, and no more."""
    yield output(request, 70)
    await asyncio.Event().wait()


async def silent(request: AddRequest) -> AsyncIterator[RequestOutput]:
    """Send no token."""
    await asyncio.Event().wait()
    yield output(request, 70)


# --- completions ---------------------------------------------------------------------------------


async def test_completion(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    scheduler.script = tokens(*letters(tokenizer, "hé!"))
    answer = await api.completions.create(model=MODEL, prompt="the cat", max_tokens=20)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "hé!", "length", None)
    assert answer.usage is not None
    prompt_tokens = len(tokenizer.encode("the cat"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 4)
    assert answer.usage.total_tokens == prompt_tokens + 4
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_completion_defaults_and_parameters_reach_the_scheduler(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    await api.completions.create(model=MODEL, prompt="x")
    sampling = scheduler.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.n) == (1.0, 16, 1.0, 1)
    own = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True}
    await api.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        extra_body={**own, "stop_token_ids": [33], "skip_special_tokens": False},
    )
    request = scheduler.requests[1]
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in own} == own
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.9, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.1)
    assert request.end_token_ids == [33]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("one", 1), (["one", "two"], 2), ([5, 6], 1), ([[5, 6], [7], [8]], 3)],
)
async def test_every_form_of_prompt_with_n(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, prompt: Any, num_prompts: int
) -> None:
    async def first_prompt_token(request: AddRequest) -> AsyncIterator[RequestOutput]:
        yield output(request, request.prompt_token_ids[0], finish_reason="length")

    scheduler.script = first_prompt_token
    answer = await api.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))
    many = prompt if num_prompts > 1 else [prompt]
    prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in many]
    expected = [tokenizer.decode(ids[:1]) for ids in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 2 * num_prompts


async def test_prompts_of_a_request_run_concurrently(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler) -> None:
    all_here = asyncio.Barrier(4)

    async def together(request: AddRequest) -> AsyncIterator[RequestOutput]:
        await all_here.wait()
        yield output(request, 70, finish_reason="length")

    scheduler.script = together
    answer = await api.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert len(answer.choices) == 4


async def test_completion_stream(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    scheduler.script = tokens(*letters(tokenizer, "hé STOP it"))
    stream = await api.completions.create(
        model=MODEL, prompt="x", stream=True, stop=["STOP"], max_tokens=30, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hé "
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len("hé STOP".encode())


async def test_completion_stream_of_several_choices(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = tokens(*letters(tokenizer, "abc"))
    stream = await api.completions.create(model=MODEL, prompt=["x", "y"], n=2, stream=True)
    texts = dict.fromkeys(range(4), "")
    ends = []
    async for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends.append(choice.index)
        assert chunk.usage is None
    assert set(texts.values()) == {"abc"}
    assert sorted(ends) == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = letters(tokenizer, "aé")
    scheduler.script = tokens(*ids)
    answer: Any = await api.completions.create(model=MODEL, prompt="x", logprobs=1, stream=stream)
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    found = [choice.logprobs for choice in choices]
    assert [token for logprobs in found for token in logprobs.tokens] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert [logprob for logprobs in found for logprob in logprobs.token_logprobs] == [-0.5] * 3
    tops = [top for logprobs in found for top in logprobs.top_logprobs]
    assert tops == [{"a": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}]
    assert [offset for logprobs in found for offset in logprobs.text_offset] == [0, 1, 1]


# --- chat ----------------------------------------------------------------------------------------


async def test_chat(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    scheduler.script = tokens(*letters(tokenizer, "hi"), 2)
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    answer = await api.chat.completions.create(model=MODEL, messages=messages)
    assert answer.object == "chat.completion"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hi")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    [request] = scheduler.requests
    expected = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert request.prompt_token_ids == tokenizer.encode_chat(expected)
    assert request.sampling.max_tokens == 96 - len(request.prompt_token_ids)  # the rest of the context
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(request.prompt_token_ids), 3)


async def test_chat_stream(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    scheduler.script = tokens(*letters(tokenizer, "hé"), 2)
    stream = await api.chat.completions.create(
        model=MODEL, messages=USER, stream=True, n=2, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == "hé"
        assert [choice.finish_reason for choice in choices] == [*[None] * (len(choices) - 1), "stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 2 * 4


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = letters(tokenizer, "aé")
    scheduler.script = tokens(*ids)
    answer: Any = await api.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [bytes(entry.bytes) for entry in entries] == [b"a", b"\xc3", b"\xa9"]
    assert entries[0].token == "a"
    assert [entry.logprob for entry in entries] == [-0.5] * 3
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [[-0.5, -1.5]] * 3
    assert [entry.top_logprobs[0].bytes for entry in entries] == [entry.bytes for entry in entries]


async def test_chat_limits(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler) -> None:
    await api.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=5)
    await api.chat.completions.create(model=MODEL, messages=USER, max_tokens=6)
    assert [request.sampling.max_tokens for request in scheduler.requests] == [5, 6]
    for limit in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError) as caught:
            await api.chat.completions.create(model=MODEL, messages=USER, extra_body={limit: 95})
        assert caught.value.param == limit
    with pytest.raises(openai.BadRequestError) as caught:
        await api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 200}])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="begins with a user"):
        await api.chat.completions.create(model=MODEL, messages=[{"role": "assistant", "content": "x"}])


# --- other routes --------------------------------------------------------------------------------


async def test_models(api: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()] == [MODEL]
    assert (await api.models.retrieve(MODEL)).owned_by == "hbserve"
    with pytest.raises(openai.NotFoundError) as caught:
        await api.models.retrieve("another")
    assert caught.value.code == "model_not_found"


async def test_health(http: httpx.AsyncClient, scheduler: ScriptedScheduler, client: EngineClient) -> None:
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    decode = {"status": "ready", "role": "decode"}
    prefill = {"status": "lost", "role": "prefill", "why_lost": "exited with code 1"}
    scheduler.stats = {"gpu_instances": {"decode-0": decode, "decode-1": decode, "prefill-0": prefill}}
    answer = await http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["status"] == "starting"
    assert answer.json()["missing"] == {"prefill-0": "exited with code 1"}
    lost = scheduler.stats["gpu_instances"].pop("prefill-0")  # it has left, and was the last one of its phase
    answer = await http.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
    scheduler.stats["gpu_instances"] |= {"prefill-0": lost, "prefill-1": {"status": "ready", "role": "prefill"}}
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    client.declare_dead("the scheduler exited with code 1")
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "dead", "reason": "the scheduler exited with code 1"},
    )


async def test_stats(http: httpx.AsyncClient, scheduler: ScriptedScheduler, client: EngineClient) -> None:
    scheduler.stats = {"cpu_scheduler": {"open_requests": 3, "success_rate": 0.5}, "gpu_instances": {}}
    answer = await http.get("/stats")
    assert (answer.status_code, answer.json()) == (200, scheduler.stats)
    client.declare_dead("the scheduler exited with code 1")
    answer = await http.get("/stats")
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert (error["code"], error["message"]) == ("engine_dead", "the scheduler exited with code 1")


# --- errors --------------------------------------------------------------------------------------


JSON_BODY = {"Content-Type": "application/json"}


async def error_of(http: httpx.AsyncClient, path: str, status: int, body: Any = None, **options: Any) -> dict[str, Any]:
    """Send a request that must fail with ``status``; return the error in OpenAI's shape."""
    if body is not None:
        options["json"] = body
    answer = await http.post(path, **options)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    for path, more in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": USER})):
        error = await error_of(http, path, 404, {"model": "gpt-5", **more})
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gpt-5'" in error["message"]
        assert f"'{MODEL}'" in error["message"]


REFUSED_IN_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"n": 1.5}, "n"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 96}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["a", 3]}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"logit_bias": {"50": 101}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"hot": 1}}, "logit_bias"),
    ({"logit_bias": {"5_0": 1}}, "logit_bias"),
    ({"top_k": 2**64}, "top_k"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens"),
    ({"grammar": "start: ("}, "grammar"),
    ({"grammar": "start: /a{1000000}/"}, "grammar"),  # compiles, but cannot be followed
    ({"grammar": "start: /[a&&b]/"}, "grammar"),  # allows no text
    ({"grammar": "start: /a/", "min_tokens": 2}, "min_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": "long " * 100}, "prompt"),
    ({"prompt": None}, "prompt"),
]


async def test_completion_parameters_that_are_refused(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    for more, param in REFUSED_IN_COMPLETIONS:
        error = await error_of(http, "/v1/completions", 400, {"model": MODEL, "prompt": "x", **more})
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert error["code"] == ("context_length_exceeded" if "maximum context length" in error["message"] else None)
        assert param.split(".")[-1] in error["message"]
        assert scheduler.requests == []


TOOLS = [{"type": "function", "function": {"name": "f"}}]
BAD_SCHEMA = {"name": "x", "schema": {"type": "no such type"}}
DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"properties": DEEP}
BAD_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}

REFUSED_IN_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"tools": TOOLS}, "tools"),  # this model's template has no tools
    ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools.0.function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    (
        {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
    ),  # this model's template has no such option
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": BAD_SCHEMA}}, "response_format"),
    ({"logit_bias": {"50": -101}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "messages.0.tool_calls.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
    ({"messages": "hi"}, "messages"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"web_search_options": {"user_location": "here"}}, "web_search_options"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
]


async def test_chat_parameters_that_are_refused(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    for more, param in REFUSED_IN_CHATS:
        body = json.dumps({"model": MODEL, "messages": USER, **more}).encode()
        error = await error_of(http, "/v1/chat/completions", 400, content=body, headers=JSON_BODY)
        assert error["param"] == param
        assert scheduler.requests == []


async def test_values_that_ask_for_nothing_are_accepted(http: httpx.AsyncClient) -> None:
    labels = {"user": "me", "metadata": {"a": "b"}, "stream_options": None, "logit_bias": {}}
    nothing = {"temperature": None, "stop": None, "n": None, "seed": None, "stream": None, "max_tokens": None}
    completion = {"echo": False, "suffix": None, "best_of": 1, "logprobs": None}
    chat = {
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "logprobs": False,
    }
    for path, more in (
        ("/v1/completions", {"prompt": "x", **completion}),
        ("/v1/chat/completions", {"messages": USER, **chat}),
    ):
        answer = await http.post(path, json={"model": MODEL, **labels, **nothing, **more})
        assert answer.status_code == 200, answer.text


async def test_a_misspelt_parameter_is_answered_with_the_right_one(http: httpx.AsyncClient) -> None:
    error = await error_of(http, "/v1/completions", 400, {"model": MODEL, "prompt": "x", "temprature": 1})
    assert "did you mean 'temperature'" in error["message"]
    error = await error_of(http, "/v1/chat/completions", 400, {"model": MODEL, "messages": USER, "echo": True})
    assert "unknown parameter 'echo'; valid are: " in error["message"]
    error = await error_of(http, "/v1/completions", 400, content=b'{"\\ud83d": 1}', headers=JSON_BODY)
    assert "lone surrogate" in error["message"]


async def test_bodies_that_are_not_requests(http: httpx.AsyncClient) -> None:
    for content in (b'{"model": ', b"", b"[1]", b'"text"', b"\xff"):
        await error_of(http, "/v1/completions", 400, content=content, headers=JSON_BODY)
    await error_of(http, "/v1/completions", 400, content=b"model=x", headers={"Content-Type": "text/plain"})
    error = await error_of(http, "/v1/completions", 400, {"model": MODEL})
    assert error["param"] == "prompt"
    await error_of(http, "/v1/nothing", 404, {})
    assert (await http.get("/v1/completions")).status_code == 405


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("OverloadedError", 503, "overloaded"),
        ("RequestFailedError", 500, "request_failed"),
        ("UnservedError", 503, "no_instance"),
    ],
)
async def test_failures_before_the_first_token(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, stream: bool, kind: str, status: int, code: str
) -> None:
    scheduler.script = fails(kind, "4096 requests are waiting")
    body = {"model": MODEL, "prompt": ["x", "y"], "stream": stream}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["message"]) == (code, "4096 requests are waiting")
    assert answer.headers.get("Retry-After") == ("1" if kind == "OverloadedError" else None)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_failure_in_a_stream_is_its_last_event(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, path: str
) -> None:
    scheduler.script = fails("RequestFailedError", "no instance that decodes came back", after=2)
    body = {"model": MODEL, "prompt": "x"} if "chat" not in path else {"model": MODEL, "messages": USER}
    answer = await http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["message"] == "no instance that decodes came back"
    assert last["error"]["code"] == "request_failed"


async def test_openai_client_raises_for_a_failure_in_a_stream(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = fails("RequestFailedError", "lost", after=1)
    stream = await api.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        [chunk async for chunk in stream]


async def test_dead_engine(http: httpx.AsyncClient, scheduler: ScriptedScheduler, client: EngineClient) -> None:
    scheduler.script = silent
    waiting = asyncio.create_task(error_of(http, "/v1/completions", 503, {"model": MODEL, "prompt": "x"}))
    await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
    client.declare_dead("the scheduler exited")
    open_request = await asyncio.wait_for(waiting, DEADLINE_S)
    new_request = await error_of(http, "/v1/chat/completions", 503, {"model": MODEL, "messages": USER})
    for error in (open_request, new_request):
        assert (error["code"], error["message"]) == ("engine_dead", "the scheduler exited")


async def test_a_bug_is_a_500_that_tells_nothing(
    http: httpx.AsyncClient, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(client, "open", broken)
    error = await error_of(http, "/v1/completions", 500, {"model": MODEL, "prompt": "x"})
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


# --- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [silent, endless])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_request_of_a_client_that_disconnects_is_aborted(
    url: str, scheduler: ScriptedScheduler, script: Script, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.script = script
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        body = {"model": MODEL, "prompt": ["x", "y"], "n": 2, "stream": stream, "max_tokens": 50}
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await scheduler.wait_for(lambda: len(scheduler.requests) == 4)
        assert scheduler.aborts == []
        task.cancel()
        await asyncio.wait({task})
    await scheduler.wait_for_aborts(4)
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:  # by then all tokens have been sent
        await http.get("/v1/models")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_every_token_is_sent_at_once(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.script = endless
    body = {"model": MODEL, "messages": USER, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        role, _, content = [await asyncio.wait_for(anext(lines), DEADLINE_S) for _ in range(3)]
        assert json.loads(role.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(content.removeprefix("data: "))["choices"][0]["delta"]["content"]
    await scheduler.wait_for_aborts(1)


async def test_event_stream_format(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
    assert "content-length" not in answer.headers
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert answer.text.endswith("\n\n")
    assert all("usage" not in chunk for chunk in chunks)


async def test_stopping_the_server_aborts_unfinished_requests(
    client: EngineClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = endless
    stop = asyncio.Event()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    app = create_app(TextEngine(client, tokenizer, 96, 400), client, MODEL)
    serving = asyncio.create_task(serve(app, ServerConfig(port=0), stop, listening.set_result, 1))
    port = await asyncio.wait_for(listening, DEADLINE_S)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as http:
        task = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True}))
        await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
        stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)
        await scheduler.wait_for_aborts(1)
        with pytest.raises(httpx.ConnectError):
            await http.get("/health")
        task.cancel()
        await asyncio.wait({task})


async def test_a_port_in_use_is_named(client: EngineClient, tokenizer: Tokenizer) -> None:
    app = create_app(TextEngine(client, tokenizer, 96, 400), client, MODEL)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}"):
            await serve(app, ServerConfig(port=port), asyncio.Event())
    with pytest.raises(StartupError, match=r"no-such-host\.invalid:8000"):
        await serve(app, ServerConfig(host="no-such-host.invalid"), asyncio.Event())
    with bind(ServerConfig(port=0)) as one:
        other = bind(ServerConfig(port=one.getsockname()[1]))  # Linux allows both while no socket listens
        one.listen()
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{one.getsockname()[1]}"):
            await serve(app, other, asyncio.Event())


# --- the real system -----------------------------------------------------------------------------


async def test_real_prefill_and_decode_instances_behind_the_api(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", vocab_size=352)
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path))
    settings = PdDisaggConfig(str(tmp_path), device="cpu", dtype="float32", num_blocks=64, log_level="WARNING")
    async with DisaggregatedLLM(settings) as llm:
        stop = asyncio.Event()
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        app = create_app(llm.engine, llm.client, MODEL)
        serving = asyncio.create_task(serve(app, ServerConfig(port=0), stop, listening.set_result, 1))
        url = f"http://127.0.0.1:{await asyncio.wait_for(listening, DEADLINE_S)}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as api:
            own: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
            expected = tokenizer.decode(greedy_reference(model, tokenizer.encode("the cat"), 20))
            answer = await api.completions.create(model=MODEL, prompt=["the cat"] * 2, n=2, **own)
            assert [choice.text for choice in answer.choices] == [expected] * 4
            stream = await api.completions.create(model=MODEL, prompt="the cat", stream=True, **own)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == expected

            sampled: dict[str, Any] = {"model": MODEL, "messages": USER, "seed": 5, "n": 2, "max_tokens": 9}
            first, second = [await api.chat.completions.create(**sampled) for _ in range(2)]
            texts = [choice.message.content for choice in first.choices]
            assert texts == [choice.message.content for choice in second.choices]
            assert texts[0] != texts[1]

            own["max_tokens"] = None  # would run for a thousand tokens
            stream = await api.chat.completions.create(model=MODEL, messages=USER, stream=True, **own)
            await anext(aiter(stream))
            await stream.close()
        await asyncio.to_thread(assert_no_leaks, llm)
        assert llm.get_system_stats()["cpu_scheduler"]["aborted_requests"] == 1
        stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)


async def test_a_client_that_leaves_amid_its_body_is_no_error(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = url.removeprefix("http://").split(":")
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        for content_type in ("application/json", "text/plain"):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: 99\r\n\r\n"
            writer.write(head.encode() + b'{"prompt": ')
            writer.write_eof()
            async with asyncio.timeout(DEADLINE_S):
                assert b" 5" not in (await reader.read())[:12]
            writer.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_refusal_quotes_no_more_than_its_reader_can_use(http: httpx.AsyncClient) -> None:
    for answer in (
        await http.get(f"/v1/models/{'m' * 20_000}"),
        await http.post("/v1/completions", json={"model": "m" * 20_000, "prompt": "x"}),
        await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "n" * 20_000: 1}),
    ):
        assert answer.status_code in (400, 404)
        error = answer.json()["error"]
        assert 0 < len(error["message"]) <= 1000
        assert len(error["param"] or "") <= 1000


@pytest.mark.parametrize("odd", ["\ud83d", 2**64, -(2**63) - 1])
async def test_a_value_that_no_process_can_send_on_is_refused_wherever_it_stands(
    http: httpx.AsyncClient, odd: Any
) -> None:
    user = {"role": "user", "content": "hi"}
    part = {"type": "input_text", "text": "hi"}
    for path, param, body in (
        ("/v1/chat/completions", "messages", {"messages": [{**user, "extra": [odd]}]}),
        ("/v1/chat/completions", "metadata", {"messages": [user], "metadata": {"a": odd}}),
        ("/v1/chat/completions", "chat_template_kwargs", {"messages": [user], "chat_template_kwargs": {"a": [odd]}}),
        ("/tokenize", "messages", {"messages": [{**user, "extra": odd}]}),
        ("/v1/completions", "user", {"prompt": "hi", "user": odd}),
        ("/v1/responses", "input", {"input": [{"role": "user", "content": [{**part, "extra": odd}]}]}),
        ("/v1/responses", "metadata", {"input": "hi", "metadata": {"a": odd}, "stream": True}),
    ):
        error = await error_of(http, path, 400, content=json.dumps(body), headers=JSON_BODY)
        assert error["param"] == param
        assert "lone surrogate" in error["message"] or "64 bits" in error["message"]


@pytest.mark.parametrize("timeout_s", [0, -1, 1e10, 1e308, float("inf"), float("nan")])
async def test_a_time_limit_that_no_message_can_have_is_refused(http: httpx.AsyncClient, timeout_s: float) -> None:
    """The scheduler would drop the message, and the client wait for an answer until its limit."""
    body = json.dumps({"role": "prefill", "timeout_s": timeout_s})
    error = await error_of(http, "/v1/instances/unified-0/role", 400, content=body, headers=JSON_BODY)
    assert error["param"] == "timeout_s"
    answer = await http.delete(f"/v1/instances/unified-0?timeout_s={timeout_s}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout_s")

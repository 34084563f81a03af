"""The Responses API, used by OpenAI's client: answers, streams, tools, structured output, and stored responses."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from hbserve.server.responses.store import ResponseStore, StoredResponse, by_id
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, letters
from tests.support.scripted_scheduler import ScriptedScheduler, fails, tokens

pytest.importorskip("llguidance")

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "of a place",
    "parameters": {"type": "object", "properties": {"place": {"enum": ["Oslo", "Rome"]}}, "required": ["place"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("responses"), tiny_tokenizers.TOOL_TEMPLATE))


@pytest.fixture
def max_model_len() -> int:
    return 1024


def prompt_of(scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> str:
    """Return the text of the last request's prompt."""
    return tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)


def say(scheduler: ScriptedScheduler, tokenizer: Tokenizer, text: str, end: str = "stop") -> None:
    """Have the model answer so: its end token is the last, unless the output is cut off."""
    ids = letters(tokenizer, text)
    scheduler.script = tokens(*ids, *([2] if end == "stop" else []), end=end)


async def test_an_answer_with_its_settings_and_counts(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    say(scheduler, tokenizer, "hello")
    response = await api.responses.create(
        model=MODEL,
        input="hi there",
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        metadata={"a": "b"},
        user="me",
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto"},
        truncation="disabled",
        extra_body={"top_k": 7},
    )
    sampling = scheduler.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 7, 50)
    prompt = prompt_of(scheduler, tokenizer)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt.replace("system \n", "system\n")
    assert "hi there" in prompt
    assert response.output_text == "hello"
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 50)
    assert (response.metadata, response.user, response.instructions) == ({"a": "b"}, "me", "Be brief.")
    assert response.usage is not None
    assert response.usage.input_tokens == len(scheduler.requests[0].prompt_token_ids)
    assert response.usage.output_tokens == 6
    assert response.usage.total_tokens == response.usage.input_tokens + 6
    assert response.usage.input_tokens_details.cached_tokens == 2
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    say(scheduler, tokenizer, "hel", end="length")
    cut = await api.responses.create(model=MODEL, input="x", max_output_tokens=3)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert (cut.output[0].status, cut.output_text) == ("incomplete", "hel")


async def test_items_of_history_become_the_prompt_and_what_no_prompt_needs_is_ignored(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    items: Any = [
        {"role": "developer", "content": "Speak Latin."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "salve"}], "extra": 1},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None, "status": None},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "phase": "commentary",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": None}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"place": "Rome"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "", "namespace": None},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rainy"}]},
        {"role": "user", "content": "and?"},
    ]
    await api.responses.create(model=MODEL, input=items, instructions="Be brief.", tools=[WEATHER])
    prompt = prompt_of(scheduler, tokenizer)
    parts = [
        "Be brief.\n\nSpeak Latin.",
        "salve",
        "I look.",
        "<tool_call>get_weather",
        "sunny",
        "rainy",
        "and?",
    ]
    places = [prompt.rindex(part) for part in parts]
    assert places == sorted(places)
    assert prompt.count("<tool_call>get_weather") == 2
    assert '"name": "get_weather"' in prompt  # the tool is offered


KINDS = ["response.created", "response.in_progress"]
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


async def test_events_of_a_stream(
    api: openai.AsyncOpenAI, http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    say(scheduler, tokenizer, f"Let me see.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}")
    request: Any = {"model": MODEL, "input": "weather?", "tools": [WEATHER]}
    events = [event async for event in await api.responses.create(**request, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    distinct = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    middle = [f"response.{kind}" for kind in [*MESSAGE, "output_item.done", *CALLED, *CALLED]]
    assert distinct == [*KINDS, *middle, "response.completed"]
    assert kinds.count("response.function_call_arguments.delta") > 4
    final = events[-1].response
    assert final.output_text == "Let me see."
    assert [json.loads(item.arguments)["place"] for item in final.output[1:]] == ["Oslo", "Rome"]
    assert len({item.id for item in final.output}) == len({item.call_id for item in final.output[1:]}) + 1 == 3
    assert events[0].response.status == "in_progress"
    for event in events:
        if event.type == "response.output_item.done":
            assert event.item == final.output[event.output_index]
    whole = await api.responses.create(**request)
    plain = [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    assert plain == [item.model_dump(exclude={"id", "call_id"}) for item in final.output]
    # the names of events are there for clients that go by them, and the stream ends with its last event
    answer = await http.post("/v1/responses", json=request | {"stream": True})
    frames = answer.text.strip().split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert frames[-1].startswith("event: response.completed")
    say(scheduler, tokenizer, "hel", end="length")
    events = [event async for event in await api.responses.create(model=MODEL, input="x", stream=True)]
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "incomplete")


async def test_a_request_that_fails_while_it_streams_ends_with_an_event(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = fails("RequestFailedError", "it burnt", after=3)
    events = [event async for event in await api.responses.create(model=MODEL, input="x", stream=True)]
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.message) == ("failed", "it burnt")
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(events[-1].response.id)
    scheduler.script = fails("OverloadedError", "full")
    with pytest.raises(openai.InternalServerError):  # nothing was sent yet, so the status says it
        await api.responses.create(model=MODEL, input="x", stream=True)


class Animal(BaseModel):
    kind: Literal["dog", "parrot"]
    tame: bool


async def test_structured_output(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    say(scheduler, tokenizer, '{"kind":"dog","tame":true}')
    parsed = await api.responses.parse(model=MODEL, input="an animal", text_format=Animal)
    assert parsed.output_parsed == Animal(kind="dog", tame=True)
    assert scheduler.requests[-1].sampling.grammar is not None
    assert parsed.text is not None
    assert parsed.text.format.type == "json_schema"
    async with api.responses.stream(model=MODEL, input="an animal", text_format=Animal) as stream:
        deltas = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        assert (await stream.get_final_response()).output_parsed == Animal(kind="dog", tame=True)
    assert deltas == '{"kind":"dog","tame":true}'
    await api.responses.create(model=MODEL, input="x", text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert scheduler.requests[-1].sampling.grammar is not None
    await api.responses.create(model=MODEL, input="x", text={"format": {"type": "text"}})
    assert scheduler.requests[-1].sampling.grammar is None


async def test_tools_forced_and_allowed_and_their_answers_in_the_next_response(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    clock: Any = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
    say(scheduler, tokenizer, CALL)
    first = await api.responses.create(model=MODEL, input="weather?", tools=[WEATHER, clock])
    [call] = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"place": "Oslo"})
    say(scheduler, tokenizer, "Sunny.")
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    second = await api.responses.create(
        model=MODEL, input=output, previous_response_id=first.id, tools=[WEATHER], instructions="New."
    )
    prompt = prompt_of(scheduler, tokenizer)
    places = [prompt.index(part) for part in ("New.", "weather?", "<tool_call>get_weather", "sun")]
    assert places == sorted(places)
    assert second.previous_response_id == first.id
    # the same by hand: the client sends the output back as it came
    history: Any = [{"role": "user", "content": "weather?"}, *first.output, *output]
    await api.responses.create(model=MODEL, input=history, tools=[WEATHER], instructions="New.")
    assert prompt_of(scheduler, tokenizer) == prompt
    # choices
    say(scheduler, tokenizer, CALL)
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        await api.responses.create(model=MODEL, input="x", tools=[WEATHER, clock], tool_choice=choice)
        assert scheduler.requests[-1].sampling.grammar is not None
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    await api.responses.create(model=MODEL, input="x", tools=[WEATHER, clock], tool_choice=allowed)
    assert '"name": "get_weather"' not in prompt_of(scheduler, tokenizer)
    say(scheduler, tokenizer, f"{CALL}\n{CALL}")
    one = await api.responses.create(model=MODEL, input="x", tools=[WEATHER], parallel_tool_calls=False)
    assert len(one.output) == 1
    assert one.parallel_tool_calls is False


async def test_stored_responses_can_be_continued_read_and_deleted(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    say(scheduler, tokenizer, "one")
    first = await api.responses.create(model=MODEL, input="aaa", instructions="Only here.")
    assert (await api.responses.retrieve(first.id)).model_dump() == first.model_dump()
    say(scheduler, tokenizer, "two")
    stream = await api.responses.create(model=MODEL, input="bbb", previous_response_id=first.id, stream=True)
    second = [event async for event in stream][-1].response
    third = await api.responses.create(model=MODEL, input="ccc", previous_response_id=second.id, store=False)
    prompt = prompt_of(scheduler, tokenizer)
    places = [prompt.index(part) for part in ("aaa", "one", "bbb", "two", "ccc")]
    assert places == sorted(places)
    assert "Only here." not in prompt  # instructions are those of one response
    items = (await api.responses.input_items.list(second.id)).data
    assert [item.content for item in items] == ["bbb"]
    await api.responses.delete(first.id)
    for gone in (first.id, third.id, "resp_0"):
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as caught:
            await api.responses.create(model=MODEL, input="x", previous_response_id=gone)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    bad: Any = [{"role": "user", "content": "x"}, {"type": "web_search_call", "id": "ws_1"}]
    with pytest.raises(openai.BadRequestError) as refused:
        await api.responses.create(model=MODEL, input=bad, previous_response_id=second.id)
    assert refused.value.param == "input.1"
    again = await api.responses.create(model=MODEL, input="ddd", previous_response_id=second.id)
    assert again.status == "completed"  # it needs nothing of the one that was deleted


def test_the_store_is_bounded_in_number_and_bytes_and_divided_by_key() -> None:
    def stored(size: int, key: str = "a") -> StoredResponse:
        return StoredResponse(key, b"x" * size, [], {}, {})

    store = ResponseStore(max_responses=3, max_bytes=100)
    for number in range(5):
        store.put(str(number), stored(10))
    assert [store.get(str(number), "a") is not None for number in range(5)] == [False, False, True, True, True]
    assert store.get("4", "b") is None
    store.put("large", stored(85))
    assert [store.get(name, "a") is not None for name in ("3", "4", "large")] == [False, True, True]
    store.put("too large", stored(101))
    assert store.get("too large", "a") is None
    store.delete("large")
    store.put("next", stored(90))
    assert len(store) == 2


def test_items_are_found_by_id_and_key_until_their_last_response_goes() -> None:
    store = ResponseStore()
    history = [b'{"id": "before"}']
    store.put("1", StoredResponse("a", b"", history, {"q": b"1"}, {"msg": b"2"}))
    assert [store.item(name, "a") for name in ("q", "msg", "before", "1")] == [b"1", b"2", None, None]
    assert store.item("msg", "b") is None
    store.put("2", StoredResponse("a", b"", history, {"msg": b"2"}, {"next": b"3"}))
    store.delete("1")
    assert [store.item(name, "a") for name in ("q", "msg", "next")] == [None, b"2", b"3"]
    store.delete("2")
    assert store.item("msg", "a") is None
    first, *others = by_id([{"id": "x"}, {"id": "x"}, {"id": 7}, {}])
    assert first == "x"
    assert len(others) == 3


async def test_logprobs(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    say(scheduler, tokenizer, "abc", end="length")
    request: Any = {"model": MODEL, "input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = await api.responses.create(**request)
    logprobs = response.output[0].content[0].logprobs
    assert [entry.token for entry in logprobs] == ["a", "b", "c"]
    assert [len(entry.top_logprobs) for entry in logprobs] == [2, 2, 2]
    events = [event async for event in await api.responses.create(**request, stream=True)]
    deltas = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.token for entry in deltas] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0"),
        ({"input": [{"type": "item_reference"}]}, "input.0"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools"),
        ({"tools": [{"type": "function", "name": "with space"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["everything"]}, "include"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"max_output_token": 5}, "max_output_token"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}}, "text.format"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
    ],
    ids=str,
)
async def test_what_is_not_supported_is_refused_by_name(http: httpx.AsyncClient, change: Any, param: str) -> None:
    answer = await http.post("/v1/responses", json={"model": MODEL, "input": "x"} | change)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


async def test_values_that_ask_for_nothing_are_taken(http: httpx.AsyncClient) -> None:
    nothing: dict[str, Any] = {
        "background": False,
        "conversation": None,
        "include": [],
        "max_output_tokens": 8.0,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt": None,
        "prompt_cache_key": "k",
        "reasoning": {"effort": None, "summary": None, "generate_summary": None},
        "safety_identifier": "s",
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "text": {},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "n": 1,
    }
    answer = await http.post("/v1/responses", json={"input": "x"} | nothing)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == MODEL

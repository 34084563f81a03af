"""Features of OpenAI's API beyond plain text: tools, structured output, echo and others, used by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.grammar import Vocabulary, json_schema
from hbserve.pd_disagg import LLM
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.engines import assert_no_leaks
from tests.support.http_server import MODEL, USER, letters, served
from tests.support.paths import ROOT
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens
from tests.unit.server.test_tool_calls import TEMPLATES

pytest.importorskip("llguidance")

DEMO_MODEL = ROOT / "examples" / "models" / "hbserve-demo"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"$ref": "#/$defs/Place"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "$defs": {"Place": {"enum": ["Oslo", "Rome"]}},  # as pydantic writes nested models
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tools"), tiny_tokenizers.TOOL_TEMPLATE))


@pytest.fixture
def max_model_len() -> int:
    return 1024


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    other = CALL.replace("Oslo", "Rome")
    scheduler.script = tokens(*letters(tokenizer, f"Let me see.\n{CALL}\n{other}"), 2)
    answer: Any = await api.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], stream=stream)
    if stream:
        choices = [chunk.choices[0] async for chunk in answer]
        content = "".join(choice.delta.content or "" for choice in choices)
        changes = [call for choice in choices for call in choice.delta.tool_calls or []]
        calls = [call for call in changes if call.id is not None]
        assert [call.index for call in calls] == [0, 1]
        assert len(changes) > 6  # arguments are sent while the model writes them
        for change in changes:
            if change.id is None:
                calls[change.index].function.arguments += change.function.arguments
        finish_reason = choices[-1].finish_reason
    else:
        message = answer.choices[0].message
        content, calls, finish_reason = message.content, message.tool_calls, answer.choices[0].finish_reason
    assert (content, finish_reason) == ("Let me see.", "tool_calls")
    assert [call.function.name for call in calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments)["place"] for call in calls] == ["Oslo", "Rome"]
    assert calls[0].id != calls[1].id
    prompt = tokenizer.decode(scheduler.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '"name": "get_weather"' in prompt


async def test_answers_of_tools_are_put_into_the_prompt(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"days": 2}'}}
    messages: Any = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "sunny"},
    ]
    await api.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none")
    prompt = tokenizer.decode(scheduler.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '<tool_call>get_weather{"days": 2}</tool_call>' in prompt
    assert "<|im_start|>tool get_weather\nsunny<|im_end|>" in prompt
    assert "of a place" not in prompt  # tool_choice="none": the prompt has no tools
    assert not prompt.endswith("<think></think>")
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    await api.chat.completions.create(model=MODEL, messages=USER, extra_body=options)
    prompt = tokenizer.decode(scheduler.requests[1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<think></think>")


async def test_no_parallel_tool_calls_means_one(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = tokens(*letters(tokenizer, CALL + CALL), 2)
    answer = await api.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], parallel_tool_calls=False)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls or []) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_ends_where_its_object_ends(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    """With one call at most: not at the mark inside an argument, and nothing is generated after the call."""
    arguments = '{"place": "</tool_call>", "text": "}{"}'
    call = f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}'
    scheduler.script = tokens(*letters(tokenizer, call), end=None)  # a model that goes on for ever
    answer: Any = await api.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], parallel_tool_calls=False, stream=stream
    )
    found = await _calls(answer)
    assert found == ([("get_weather", arguments)], "tool_calls")
    await scheduler.wait_for_aborts(1)


async def _calls(answer: Any) -> tuple[list[tuple[str, str]], str | None]:
    """Return the calls of a whole or streamed answer, and its finish reason."""
    if not hasattr(answer, "__aiter__"):
        [choice] = answer.choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        return calls, choice.finish_reason
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    reason = None
    async for chunk in answer:
        [choice] = chunk.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            names.setdefault(call.index, call.function.name)
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    return [(names[index], arguments[index]) for index in names], reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "max_tokens", "reason"), [("Os", 100, "stop"), (None, 60, "length"), (["days"], 100, "stop")]
)
async def test_a_cut_call_does_not_end_with_tool_calls(
    api: openai.AsyncOpenAI,
    scheduler: ScriptedScheduler,
    tokenizer: Tokenizer,
    stream: bool,
    stop: str | list[str] | None,
    max_tokens: int,
    reason: str,
) -> None:
    """Also after a call that is whole: the last one counts."""
    for text in (CALL, CALL.replace("Oslo", "Rome").replace("days", "weeks") + CALL):
        size = max_tokens + text.index(CALL)
        ids = letters(tokenizer, text)[:size]
        scheduler.script = tokens(*ids, end="length" if size == len(ids) else "stop")
        answer: Any = await api.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], stop=stop, stream=stream
        )
        calls, finish_reason = await _calls(answer)
        assert len(calls) == (2 if text != CALL else 1)
        assert finish_reason == reason


FORCED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"required": ["x"], "properties": {"x": {"const": 1}}}}},
        {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}]},
        {"type": ["null", "object"], "required": ["x"]},
        {},
        {"description": "anything"},
        {"type": "object"},
    ],
)
async def test_forced_calls_have_an_object_of_arguments(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, parameters: dict[str, Any]
) -> None:
    """Whatever the schema says or leaves out about the type."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    await api.chat.completions.create(model=MODEL, messages=USER, tools=[tool], tool_choice=FORCED)
    grammar = scheduler.requests[-1].sampling.grammar
    assert grammar is not None
    vocabulary = Vocabulary(read_vocabulary(tokenizer.path), tokenizer.vocab_size + 1)
    for arguments in ("4", "null", '"x"', "[]", "true", '{"x": 1}'):
        text = CALL[: CALL.index('{"place')] + arguments + "}\n</tool_call>"
        ids = [token for part in text.split("\n") for token in (*letters(tokenizer, part), *letters(tokenizer, "\n"))]
        problem = vocabulary.problem_of(grammar, ids[:-1])
        assert (problem is None) == arguments.startswith("{"), (arguments, problem)


@pytest.mark.parametrize("kind", ["string", "array", ["null", "integer"]])
async def test_parameters_that_are_no_object_cannot_be_forced(api: openai.AsyncOpenAI, kind: object) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": kind}}}
    with pytest.raises(openai.BadRequestError, match="the arguments of a call are an object") as caught:
        await api.chat.completions.create(model=MODEL, messages=USER, tools=[tool], tool_choice="required")
    assert caught.value.body["param"] == "tools"


# --- other parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool) -> None:
    scheduler.script = tokens(*letters(tokenizer, "abc"))
    prompts = ["the cat", "a dog"]
    answer: Any = await api.completions.create(model=MODEL, prompt=prompts, n=2, echo=True, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for choice in [chunk.choices[0] async for chunk in answer] if stream else answer.choices:
        texts[choice.index] += choice.text
    assert list(texts.values()) == ["the catabc"] * 2 + ["a dogabc"] * 2
    ids = letters(tokenizer, "hé")
    answer = await api.completions.create(model=MODEL, prompt=ids, echo=True)
    assert answer.choices[0].text == "héabc"


async def test_logit_bias_and_usage_in_every_chunk(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, http: httpx.AsyncClient
) -> None:
    await api.chat.completions.create(model=MODEL, messages=USER, logit_bias={"50": -100, "7": 1.5})
    assert scheduler.requests[0].sampling.logit_bias == {50: -100, 7: 1.5}
    stream = await api.completions.create(
        model=MODEL,
        prompt="x",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 3


async def test_tokenize_and_detokenize(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = (await http.post("/tokenize", json={"model": MODEL, "prompt": "the cat"})).json()
    ids = tokenizer.encode("the cat")
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 1024}
    assert (await http.post("/tokenize", json={"messages": USER})).json()["tokens"] == tokenizer.encode_chat(USER)
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "the cat"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": "x", "add": 1}, "add"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens.0"),
    ):
        refused = await http.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


# --- structured output, by the real engine -------------------------------------------------------


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog", "parrot", "eagle"]
    tame: bool


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prefill and decode instances of the demo model."""
    with LLM(str(DEMO_MODEL), device="cpu", dtype="float32", num_blocks=256, log_level="WARNING") as llm:
        yield llm


@pytest.fixture
async def real_api(llm: LLM) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of a server in this process's event loop, over the running instances."""
    inner = llm._llm
    client = EngineClient(inner._address)
    await client.connect()
    ready = await client.wait_ready(DEADLINE_S)
    engine = TextEngine(client, inner.engine.tokenizer, ready.max_model_len, ready.vocab_size)
    async with (
        served(engine, client) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as api,
    ):
        yield api
    await client.close()


def test_outputs_follow_their_grammars_and_leave_others_alone(llm: LLM) -> None:
    prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    plain = SamplingParams(temperature=0, max_tokens=16)
    [alone] = llm.generate(prompt, plain, use_tqdm=False)
    schema = Animal.model_json_schema()
    constrained = [
        SamplingParams(temperature=1, seed=seed, max_tokens=80, grammar=json_schema(schema), presence_penalty=0.5)
        for seed in range(6)
    ]
    pattern = SamplingParams(temperature=0.9, seed=1, max_tokens=40, grammar="start: /[a-c]{3,9}x/", logprobs=1)
    outputs = llm.generate([prompt] * 8, [*constrained, pattern, plain], use_tqdm=False)
    animals = {Animal.model_validate_json(output["text"]).kind for output in outputs[:6]}
    assert len(animals) > 1
    assert {output["finish_reason"] for output in outputs[:7]} == {"stop"}
    assert outputs[6]["text"].strip("abc") == "x"
    assert outputs[7]["text"] == alone["text"]
    again = llm.generate([prompt] * 6, constrained, use_tqdm=False)
    assert [output["text"] for output in again] == [output["text"] for output in outputs[:6]]
    [cut] = llm.generate(prompt, SamplingParams(max_tokens=3, grammar=json_schema(schema)), use_tqdm=False)
    assert cut["finish_reason"] == "length"
    assert_no_leaks(llm)


async def test_a_prediction_is_tried_and_counted(real_api: openai.AsyncOpenAI) -> None:
    async def answer(**more: Any) -> Any:
        messages: Any = [{"role": "user", "content": "Count from 5 to 20."}]
        return await real_api.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=60, **more
        )

    plain = await answer()
    assert plain.usage.completion_tokens_details is None
    text = plain.choices[0].message.content
    half = len(text) // 2
    for content in (text, [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]):
        predicted = await answer(prediction={"type": "content", "content": content})
        assert predicted.choices[0].message.content == text
        assert predicted.usage.completion_tokens == plain.usage.completion_tokens
        details = predicted.usage.completion_tokens_details
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": Animal.model_json_schema()}}
    document = (await answer(response_format=form)).choices[0].message.content
    predicted = await answer(
        response_format=form, prediction={"type": "content", "content": document[:-9] + '": true}'}
    )
    assert predicted.choices[0].message.content == document
    assert predicted.usage.completion_tokens_details.accepted_prediction_tokens > 0
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for wrong, param in (
        ({"type": "content"}, "prediction.content"),
        ({"type": "text", "content": "a"}, "prediction.type"),
        ("a", "prediction"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": [image]}, "prediction.content.0.type"),
    ):
        with pytest.raises(openai.BadRequestError, match="prediction") as refused:
            await answer(prediction=wrong)
        assert refused.value.param == param
    response = await real_api.responses.create(
        model=MODEL, input="Count.", max_output_tokens=5, extra_body={"prediction": {"type": "content", "content": "5"}}
    )
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 0


async def test_structured_output_through_the_api(real_api: openai.AsyncOpenAI) -> None:
    answer = await real_api.chat.completions.parse(
        model=MODEL, messages=USER, response_format=Animal, seed=3, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Animal)
    anything: Any = {"model": MODEL, "messages": USER, "max_tokens": 60, "seed": 4}
    answer = await real_api.chat.completions.create(**anything, response_format={"type": "json_object"})
    [choice] = answer.choices
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(("family", "several"), [("hermes", True), ("llama", False), ("mistral", True)])
async def test_forced_tool_calls_fit_their_schema(
    real_api: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, family: str, several: bool
) -> None:
    monkeypatch.setattr(Tokenizer, "tools_template", TEMPLATES[family])  # the demo model's own template has no tools
    choice: Any = "required" if several else {"type": "function", "function": {"name": "get_weather"}}
    request: Any = {"model": MODEL, "messages": USER, "tools": [CLOCK, WEATHER], "tool_choice": choice, "seed": 1}
    answer = await real_api.chat.completions.create(**request, max_tokens=400)
    calls = answer.choices[0].message.tool_calls or []
    assert calls
    assert several or len(calls) == 1
    assert not answer.choices[0].message.content
    cut = await real_api.chat.completions.create(**request, max_tokens=(answer.usage.completion_tokens - 4))
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content or "") == ("length", "")
    begun = [call.function for call in cut.choices[0].message.tool_calls or []]
    assert [call.function for call in calls][: len(begun) - 1] == begun[:-1]
    assert calls[len(begun) - 1].function.arguments.startswith(begun[-1].arguments)
    for call in (call for call in calls if call.function.name == "get_weather"):
        arguments = json.loads(call.function.arguments)
        assert arguments["place"] in ("Oslo", "Rome")
        assert 1 <= arguments["days"] <= 9


async def test_the_clients_own_helpers(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    class GetWeather(BaseModel):
        place: Literal["Oslo", "Rome"]
        days: int

    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
    scheduler.script = tokens(*letters(tokenizer, "Let me see.\n" + CALL), 2)
    chat: Any = {"model": MODEL, "messages": USER, "tools": tools, "max_completion_tokens": 400}
    async with api.chat.completions.stream(**chat, stream_options={"include_usage": True}) as stream:
        kinds = {event.type async for event in stream}
        streamed = await stream.get_final_completion()
    assert {"content.delta", "content.done", "tool_calls.function.arguments.done", "chunk"} <= kinds
    whole = await api.chat.completions.parse(**chat)
    for answer in (streamed, whole):
        [choice] = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
        [call] = choice.message.tool_calls or []
        assert call.function.parsed_arguments == GetWeather(place="Oslo", days=2)
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    # The client sends the received calls back, together with the tool's answer.
    message = whole.choices[0].message
    again = [*USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    raw = await api.chat.completions.with_raw_response.create(model=MODEL, messages=again, tools=tools, max_tokens=1)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].finish_reason == "length"
    async with api.chat.completions.with_streaming_response.create(**chat, stream=True) as response:
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


async def test_a_costly_grammar_ends_alone(real_api: openai.AsyncOpenAI, llm: LLM) -> None:
    """It is refused at the border, or ends with an error that says so; others beside it get their right tokens."""
    plain: Any = {"model": MODEL, "messages": USER, "max_tokens": 60, "temperature": 0}
    document: Any = {"model": MODEL, "messages": USER, "max_tokens": 200, "response_format": Animal, "seed": 3}
    alone = (await real_api.chat.completions.create(**plain)).choices[0].message.content
    animal = (await real_api.chat.completions.parse(**document)).choices[0].message.parsed

    async def attack(grammar: str) -> None:
        body = {"model": MODEL, "messages": USER, "max_tokens": 400, "seed": 1, "extra_body": {"grammar": grammar}}
        with pytest.raises(openai.APIStatusError, match="grammar") as caught:
            await real_api.chat.completions.create(**body)
        assert caught.value.status_code == 400

    attacks = [asyncio.create_task(attack(grammar)) for grammar in (AT_ONCE, LATER)]
    others = [asyncio.create_task(real_api.chat.completions.create(**plain)) for _ in range(3)]
    documents = [asyncio.create_task(real_api.chat.completions.parse(**document)) for _ in range(2)]
    async with asyncio.timeout(200):
        assert {(await task).choices[0].message.content for task in others} == {alone}
        assert [(await task).choices[0].message.parsed for task in documents] == [animal, animal]
        await asyncio.gather(*attacks)
    assert_no_leaks(llm)


async def test_an_output_that_reaches_a_dead_end_is_cut_off_there(real_api: openai.AsyncOpenAI, llm: LLM) -> None:
    """The way into it is too narrow for the random trials at the border."""
    depth = 16
    rules = [f'n{level}: "a" n{level + 1} | "b" "x"' for level in range(depth)]
    grammar = "\n".join(["start: n0", *rules, f'n{depth}: "a" NEVER | "b" "x"', "NEVER: /x/ & /y/"])
    [letter] = llm._llm.engine.tokenizer.encode("a")
    extra = {"grammar": grammar, "logit_bias": {str(letter): 100}}
    request: Any = {"model": MODEL, "temperature": 0, "extra_body": extra}
    answer = await real_api.chat.completions.create(messages=USER, max_tokens=60, **request)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.stop_reason) == ("length", "grammar_dead_end")
    assert choice.message.content == "a" * (depth + 1)
    stream = await real_api.chat.completions.create(messages=USER, max_tokens=60, stream=True, **request)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("length", "grammar_dead_end")
    response = await real_api.responses.create(input="hi", max_output_tokens=60, **request)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "grammar_dead_end")
    assert response.output_text == choice.message.content
    assert_no_leaks(llm)


AT_ONCE = "start: s\ns: s s | s s s | /[a-z ]/"
LATER = "start: /[a-z ]{30}/ s\ns: s s | s s s | /[a-z ]/"

"""What clients of other makers send: fields, values and conversations that ask for nothing unusual must be taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hbserve import __version__
from hbserve.errors import InvalidRequestError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, USER, letters, served
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens

TEMPLATE = (  # as TOOL_TEMPLATE, and with a variable for the effort of reasoning and the reasoning of earlier turns
    tiny_tokenizers.TOOL_TEMPLATE.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    + "{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "hello"}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("border"), TEMPLATE))


@pytest.fixture
def max_model_len() -> int:
    return 1024


def prompt_of(scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> str:
    """Return the text of the last request's prompt."""
    return tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def chat(http: httpx.AsyncClient, messages: Any = USER, **more: Any) -> dict[str, Any]:
    answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **more})
    assert answer.status_code == 200, (messages, more, answer.text)
    document: dict[str, Any] = answer.json()
    return document


async def refused(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, (body, answer.text)
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- history -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "http://x", "title": "x"}}]},
        {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": []},
        {"id": "msg_1", "created_at": 5, "metadata": {"a": [1]}, "weight": 0.5, "parsed": {"a": 1}},
        {"tool_calls": [], "tool_call_id": None, "name": None, "reasoning_content": None},
        {"cache_control": {"type": "ephemeral"}, "provider_specific_fields": {}, "thinking_blocks": []},
        {"content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
        {"content": ["hel", {"type": "output_text", "text": "lo", "logprobs": []}]},
        {"content": None, "refusal": "hello"},
        {"content": [{"type": "refusal", "refusal": "hello"}]},
        {"content": None, "audio": {"id": "audio_1", "data": "", "transcript": "hello"}},
    ],
)
async def test_fields_that_no_template_uses_are_ignored_in_history(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    await chat(http, [*USER, ANSWER, *USER])
    expected = prompt_of(scheduler, tokenizer)
    assert "hello" in expected
    await chat(http, [{**USER[0], "timestamp": "now"}, ANSWER | more, *USER])
    assert prompt_of(scheduler, tokenizer) == expected


async def test_every_message_that_the_client_received_can_be_sent_back(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    text = 'See.<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo"}}</tool_call>'
    scheduler.script = tokens(*letters(tokenizer, text), 2)
    answer = await api.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
    received = answer.choices[0].message
    assert received.tool_calls
    result = {"role": "tool", "tool_call_id": received.tool_calls[0].id, "content": [{"type": "text", "text": "rain"}]}
    prompts = set()
    for back in (received, received.model_dump(), received.model_dump(exclude_none=True), received.to_dict()):
        history: Any = [*USER, back, result]
        await api.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER])
        prompts.add(prompt_of(scheduler, tokenizer))
    [prompt] = prompts
    assert '<tool_call>get_weather{"place": "Oslo"}</tool_call>' in prompt
    streamed = {"index": 0, **CALL, "extra_content": None}
    await api.chat.completions.create(
        model=MODEL, messages=[*USER, {"role": "assistant", "tool_calls": [streamed]}, result]
    )
    assert '<tool_call>f{"a": 1}</tool_call>' in prompt_of(scheduler, tokenizer)


async def test_names_are_for_the_template_in_every_role(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    messages: Any = [
        {"role": "system", "content": "be kind", "name": "boss"},
        {"role": "user", "content": "hi", "name": "user_proxy"},
        {"role": "assistant", "content": "yes?", "name": "helper"},
        {"role": "user", "content": "go", "name": ""},
    ]
    await api.chat.completions.create(model=MODEL, messages=messages)
    heads = [line for line in prompt_of(scheduler, tokenizer).split("\n") if "<|im_start|>" in line]
    assert [head.partition("<|im_start|>")[2] for head in heads] == [
        "system boss",
        "user user_proxy",
        "assistant helper",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"place": "Os', '{"place": "Os"}'),
        ('{"a": [1, {"b": tr', '{"a": [1, {}]}'),
        ('{"a": 1, "b', '{"a": 1}'),
        ("{", "{}"),
        ("", "{}"),
        (None, "{}"),
        ("null", "{}"),
        ({"a": 1}, '{"a": 1}'),
        ('{"a": "x\ny"}', '{"a": "x\\ny"}'),
        ("{'a': 1}", "\"{'a': 1}\""),
    ],
)
async def test_a_call_that_was_cut_off_can_be_sent_back(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, arguments: Any, shown: str
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    await chat(http, [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, *USER])
    assert f"<tool_call>f{shown}</tool_call>" in prompt_of(scheduler, tokenizer)


async def test_the_servers_own_cut_off_call_can_be_sent_back(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = tokens(*letters(tokenizer, '<tool_call>{"name": "get_weather", "arguments": {"place": "Os'))
    answer = await api.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    history: Any = [*USER, choice.message, *USER]
    await api.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER])
    assert '<tool_call>get_weather{"place": "Os"}</tool_call>' in prompt_of(scheduler, tokenizer)


async def test_functions_of_the_older_form_in_history(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    await chat(http, [*USER, call, {"role": "function", "name": "f", "content": "5"}])
    prompt = prompt_of(scheduler, tokenizer)
    assert '<tool_call>f{"a": 1}</tool_call>' in prompt
    assert "<|im_start|>tool f\n5<|im_end|>" in prompt


async def test_null_content_is_empty_in_every_role(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    for role in ("system", "user", "assistant", "tool"):
        messages = [{"role": role, "content": None}, *USER]
        await chat(http, messages)
        assert "None" not in prompt_of(scheduler, tokenizer)


async def test_unknown_fields_of_tools_are_ignored(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    await chat(http, tools=[WEATHER])
    expected = prompt_of(scheduler, tokenizer)
    function = WEATHER["function"] | {"strict": True, "returns": {}, "defer_loading": False}
    await chat(http, tools=[{"type": "function", "function": function, "cache_control": {"type": "ephemeral"}}])
    assert prompt_of(scheduler, tokenizer) == expected
    await chat(http, tools=[{"function": {"name": "f", "parameters": [], "description": None}}], tool_choice=None)


async def test_history_that_makes_no_sense_is_refused_with_its_place(http: httpx.AsyncClient) -> None:
    for message, param in (
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.1.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.1.content.0"),
        ({"role": "user", "content": {"text": "x"}}, "messages.1.content"),
        ({"role": "robot", "content": "x"}, "messages.1.role"),
        ({"content": "x"}, "messages.1.role"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.1.tool_calls.0"),
        ({"role": "assistant", "tool_calls": "f()"}, "messages.1.tool_calls"),
        ({"role": "assistant", "content": None, "audio": {"id": "audio_1"}}, "messages.1.audio"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]},
            "messages.1.tool_calls.0",
        ),
    ):
        error = await refused(http, "/v1/chat/completions", model=MODEL, messages=[*USER, message])
        assert error["param"] == param
        assert param in error["message"]


# --- content in parts ----------------------------------------------------------------------------


TEXT, PARTS = "one two", [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "cache_control": {}}]


@pytest.mark.parametrize(
    "template",
    [
        tiny_tokenizers.CHAT_TEMPLATE,
        PARTS_TEMPLATE,
        PARTS_TEMPLATE.replace("if p['type'] == 'text'", ""),
        # only the first part
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}",
        # both forms, in a macro; the system prompt only as text
        "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}"
        "{% endmacro %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.role == 'system' else show(m.content) }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        # the first message must be a user's, and roles alternate
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text | trim }} {% endfor %}{% endfor %}",
    ],
)
def test_content_reaches_every_template_as_text_and_as_parts(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path, template))
    for role in ("user", "assistant", "system", "tool"):
        prompts = []
        for content in (TEXT, PARTS):
            turns: list[Any] = [*USER, {"role": "assistant", "content": "x"}, {"role": role, "content": content}]
            if role == "assistant":
                turns = [*USER, *turns[2:]]
            if "roles" in template and role in ("system", "tool"):  # the template takes no such role
                with pytest.raises(InvalidRequestError, match="roles"):
                    tokenizer.encode_chat(turns)
                continue
            ids = tokenizer.encode_chat(turns)
            prompts.append(" ".join(tokenizer.decode(ids, skip_special_tokens=False).split()))
        assert len(set(prompts)) <= 1
        assert all(TEXT in prompt and "{" not in prompt for prompt in prompts)


async def test_one_conversation_has_the_same_prompt_by_every_path(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, client: EngineClient, tokenizer: Tokenizer
) -> None:
    history: Any = [
        {"role": "developer", "content": PARTS, "name": "boss"},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": PARTS},
    ]
    options = {"tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    for more in ({}, options, {"continue_final_message": True}, {"add_generation_prompt": False}):
        await chat(http, history, **more)
        ids = scheduler.requests[-1].prompt_token_ids
        answer = await http.post("/tokenize", json={"model": MODEL, "messages": history, **more})
        assert answer.json()["tokens"] == ids
        if not more:
            assert tokenizer.encode_chat(history) == ids
            await TextEngine(client, tokenizer, 1024, 400).generate_chat(history, SamplingParams(max_tokens=1))
            assert scheduler.requests[-1].prompt_token_ids == ids


# --- parameters ----------------------------------------------------------------------------------


async def test_values_that_ask_for_nothing_are_taken_for_every_parameter(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    for path, start in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": USER})):
        await http.post(path, json=start | {"seed": 1})
        expected = scheduler.requests[-1].sampling
        schema = (await http.get("/openapi.json")).json()
        reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        known = schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        empty: tuple[Any, ...] = (None, "", [], {})
        bodies: list[dict[str, Any]] = [dict.fromkeys(known, nothing) for nothing in empty]
        bodies += [
            dict.fromkeys(("vibes", "mirostat", "documents", "logits_processors"), nothing)
            for nothing in (*empty, False, 0, 0.0)
        ]
        bodies += [
            {"stop": [""]},
            {"logprobs": False, "echo": False} if "prompt" in start else {"logprobs": 0, "top_logprobs": 0},
            {"stream": 0, "stream_options": {"include_usage": False, "include_all": None}},
            {"response_format": {"type": "text"}, "tool_choice": "auto", "parallel_tool_calls": True},
            {"use_beam_search": False, "length_penalty": 1.0, "best_of": 1, "spaces_between_special_tokens": True},
            {"functions": [], "function_call": "auto", "modalities": ["text"], "web_search_options": None},
            {"store": True, "service_tier": "flex", "verbosity": "low", "user": 5},
            {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h", "metadata": {"a": 1}},
            {"top_k": 0, "top_p": 1, "min_p": 0, "n": 1.0, "presence_penalty": 0},
        ]
        for body in bodies:
            answer = await http.post(path, json=body | start | {"seed": 1.0})
            assert answer.status_code == 200, (body, answer.text)
            assert answer.json()["model"] == MODEL  # also if the request names none
            assert scheduler.requests[-1].sampling == expected


async def test_whole_numbers_are_integers_and_no_others(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    numbers = {"max_tokens": 5.0, "n": 2e0, "seed": 7.0, "top_k": 3.0, "min_tokens": 1.0, "stop_token_ids": [33.0, 34]}
    for path, start in (("/v1/completions", {"prompt": [5.0, 6]}), ("/v1/chat/completions", {"messages": USER})):
        answer = await http.post(path, json=start | numbers | {"temperature": 1, "logit_bias": {"5": 1}})
        assert answer.status_code == 200, answer.text
        request = scheduler.requests[-2]
        assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.top_k) == (5, 7, 3)
        assert {33, 34} <= set(request.end_token_ids)
        wrong = {**dict.fromkeys(numbers, 5.5), "max_tokens": "5", "n": True, "seed": 1e400}
        for name, value in [*wrong.items(), *((name, 1e300) for name in (*numbers, "truncate_prompt_tokens"))]:
            content = json.dumps(start | {name: value})
            answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert (await http.post("/detokenize", json={"tokens": [70.0, 71]})).status_code == 200
    assert (await http.post("/v1/completions", json={"prompt": [[5.0], [6]]})).status_code == 200
    assert (await refused(http, "/v1/completions", prompt=[5.5]))["param"] == "prompt"


async def test_a_misspelt_sampling_parameter_is_refused_with_the_nearest_name(http: httpx.AsyncClient) -> None:
    for wrong, value, right in (
        ("temprature", 0.5, "temperature"),
        ("max_token", 5, "max_tokens"),
        ("top-p", 0.9, "top_p"),
        ("repetition_penality", 1.1, "repetition_penalty"),
        ("streem", True, "stream"),
    ):
        for path, start in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": USER})):
            error = await refused(http, path, **start, **{wrong: value})
            assert (error["param"], f"did you mean '{right}'" in error["message"]) == (wrong, True)
    asked: dict[str, Any] = {"use_beam_search": True, "length_penalty": 2, "functions": [{"name": "f"}]}
    for name, value in asked.items():
        error = await refused(http, "/v1/chat/completions", messages=USER, **{name: value})
        assert (error["param"], f"{name} is not supported" in error["message"]) == (name, True)


async def test_the_effort_of_reasoning_goes_to_templates_that_name_it(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, client: EngineClient, tmp_path: Path
) -> None:
    await chat(http, reasoning_effort="high")
    assert prompt_of(scheduler, tokenizer).endswith("effort high")
    await chat(http, chat_template_kwargs={"reasoning_effort": "low"}, reasoning_effort="low")
    assert prompt_of(scheduler, tokenizer).endswith("effort low")
    clash = {"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}
    assert (await refused(http, "/v1/chat/completions", messages=USER, **clash))["param"] == "reasoning_effort"
    await chat(http, [*USER, {**ANSWER, "reasoning_content": "hm, "}, *USER])
    assert "hm, hello" in prompt_of(scheduler, tokenizer)
    plain = Tokenizer(tiny_tokenizers.byte_level(tmp_path / "plain"))
    async with (
        served(TextEngine(client, plain, 96, 400), client) as address,
        httpx.AsyncClient(base_url=address, timeout=DEADLINE_S) as other,
    ):
        await chat(other, reasoning_effort="high")
        assert scheduler.requests[-1].prompt_token_ids == plain.encode_chat(USER)


# --- small routes --------------------------------------------------------------------------------


async def test_routes_that_probes_and_clients_of_other_servers_ask_for(
    http: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    for path in (
        "/health",
        "/ready",
        "/ping",
        "/metrics",
        "/v1/models",
        "/v1/models/",
        f"/v1/models/{MODEL}",
        "/version",
    ):
        got, head = await http.get(path), await http.head(path)
        assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    assert (await http.head("/v1/models/other")).status_code == 404
    assert (await http.post("/ping")).status_code == 200
    assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()
    assert (await http.get("/version")).json() == {"version": __version__}
    info = (await http.get("/tokenizer_info")).json()
    assert (info["tokenizer_class"], info["chat_template"]) == ("PreTrainedTokenizerFast", TEMPLATE)
    assert info["eos_token"] == "<|im_end|>"

"""Models that write their reasoning between marks: chats and responses give it apart from the answer."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, USER, letters, served
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens

WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
OUTPUT = f"<think>\nMaybe {CALL}?\n</think>\n\nHello.{CALL}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template = tiny_tokenizers.TOOL_TEMPLATE.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    )
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("reasoning"), template))


@pytest.fixture
def max_model_len() -> int:
    return 1024


def say(scheduler: ScriptedScheduler, tokenizer: Tokenizer, text: str) -> None:
    scheduler.script = tokens(*letters(tokenizer, text), 2)


@pytest.mark.parametrize("stream", [False, True])
async def test_chats_give_reasoning_apart_and_take_calls_from_the_answer_only(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    say(scheduler, tokenizer, OUTPUT)

    async def chat(**more: Any) -> dict[str, Any]:
        answer: Any = await api.chat.completions.create(model=MODEL, messages=USER, stream=stream, **more)
        if not stream:
            message = answer.choices[0].message.model_dump()
            calls = message["tool_calls"] or []
        else:
            deltas = [chunk.choices[0].delta.model_dump() async for chunk in answer]
            message = {name: "".join(d.get(name) or "" for d in deltas) for name in ("content", "reasoning_content")}
            calls = [call for delta in deltas for call in delta["tool_calls"] or () if call["id"]]
        return {"reasoning": message.get("reasoning_content"), "text": message["content"], "calls": len(calls)}

    thought = f"Maybe {CALL}?"
    assert await chat(tools=[WEATHER]) == {"reasoning": thought, "text": "Hello.", "calls": 1}
    assert await chat(tools=[WEATHER], parallel_tool_calls=False) == {
        "reasoning": thought,
        "text": "Hello.",
        "calls": 1,
    }
    assert (await chat())["reasoning"] == thought
    assert not (await chat(extra_body={"include_reasoning": False}))["reasoning"]
    # With reasoning switched off the prompt has an empty one, and the output is the answer.
    say(scheduler, tokenizer, "<think>x</think>y")
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert (await chat(extra_body=options))["text"] == "<think>x</think>y"
    # A grammar describes the whole output.
    forced = {"grammar": 'start: "<think>x</think>y"'}
    assert (await chat(extra_body=forced))["text"] == "<think>x</think>y"
    assert (await api.completions.create(model=MODEL, prompt="x", max_tokens=50)).choices[0].text == "<think>x</think>y"


async def test_responses_have_an_item_of_reasoning_which_can_be_sent_back(
    api: openai.AsyncOpenAI, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    say(scheduler, tokenizer, "<think>\nHm.\n</think>\n\nHello.")
    events = [event async for event in await api.responses.create(model=MODEL, input="hi", stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds.index("reasoning_text.delta") < kinds.index("reasoning_text.done") < kinds.index("output_text.delta")
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm."
    response = events[-1].response
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output[0].content[0].text, response.output_text) == ("Hm.", "Hello.")
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    history: Any = [{"role": "user", "content": "hi"}, *response.output, {"role": "user", "content": "so?"}]
    for request in ({"input": history}, {"input": "so?", "previous_response_id": response.id}):
        await api.responses.create(model=MODEL, **request)
        prompt = tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)
        assert "[Hm.]Hello." in prompt


async def test_a_prompt_may_begin_the_reasoning_and_other_templates_have_none(
    client: EngineClient, scheduler: ScriptedScheduler, tmp_path_factory: pytest.TempPathFactory
) -> None:
    begins = tiny_tokenizers.CHAT_TEMPLATE + "{# </think> #}<think>\n"
    for template, reasoning, text in (
        (begins, "x", "y"),
        (tiny_tokenizers.CHAT_TEMPLATE, None, "x</think>\n\ny"),
    ):
        tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("template"), template))
        ready = await client.wait_ready(DEADLINE_S)
        say(scheduler, tokenizer, "x</think>\n\ny")
        engine = TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size)
        async with served(engine, client) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
            message = (await api.chat.completions.create(model=MODEL, messages=USER)).choices[0].message
        assert (getattr(message, "reasoning_content", None), message.content) == (reasoning, text)

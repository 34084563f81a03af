"""A real model, SmolLM2-135M-Instruct, in every mode and over HTTP, against transformers in float32."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.semi_pd import SMAllocation
from hbserve.tokenizer import Tokenizer
from tests.support.engines import assert_no_leaks, needs_mooncake
from tests.support.http_server import MODEL, served
from tests.support.paths import ROOT
from tests.support.real_models import smollm2_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_TOKENS = 6
DEADLINE_S = 300.0
NUM_TOP = 5
TOLERANCE = 2e-3
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 1024,
    "num_blocks": 200,
    "chunk_size": 256,
    "log_level": "WARNING",
}
LONG = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
TEXTS = [
    "a",
    "The capital of France is",
    "Die Hauptstadt von Deutschland ist",
    "La capitale de l'Italie est",
    "Столица России — это",
    "日本の首都は",
    "法国的首都是",
    "عاصمة مصر هي",
    "한국의 수도는",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "Ada", "age": 36, "tags": ["math", "',
    "🙂🙃 emoji 👩‍👩‍👧‍👦 and flags 🇫🇷",
    "1234567890 + 987654321 = ",
    "    \t  indented\n\n\n  lines\r\n",
    "<|endoftext|> is a special token, and <|im_start|> too",
    "naïve café — “quotes” … ﬁne ½ m²",
    LONG * 4,
    LONG * 30,
]
CHATS = [
    [{"role": "user", "content": "What is the capital of Spain?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And grass?"},
    ],
]
EVERY_THIRD = slice(None, None, 3)
SYSTEMS: dict[str, tuple[slice, dict[str, Any]]] = {
    "shm": (slice(None), {"mode": "disaggregated", "kv_transfer_backend": "shm"}),
    "gloo": (EVERY_THIRD, {"mode": "disaggregated", "kv_transfer_backend": "nccl"}),
    "mooncake": (EVERY_THIRD, {"mode": "disaggregated", "kv_transfer_backend": "mooncake"}),
    "semi_pd": (EVERY_THIRD, {"mode": "semi_pd", "prefill_percentage": 80, "decode_percentage": 100}),
}
"""Which prompts each system gets, and its configuration. Over HTTP the mode is ``unified``."""
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou may call these functions: {{ tools | tojson }}\n"
    'Call them as <tool_call>{"name": name, "arguments": object}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The model's own template has no tools."""
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of Italy?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER}


class Reference:
    """What transformers makes of prompts. It computes each prompt with its answer at once."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = Tokenizer(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self.prompts = [self.tokenizer.encode(text) for text in TEXTS]
        self.prompts += [self.tokenizer.encode_chat(chat) for chat in CHATS]
        assert min(map(len, self.prompts)) == 1
        assert max(map(len, self.prompts)) > 2 * SETTINGS["chunk_size"]

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Return the log-probabilities after each token, ``[tokens, vocab]``."""
        logits: torch.Tensor = self._model(torch.tensor([token_ids])).logits[0]
        return logits.float().log_softmax(-1)

    def check(self, prompt: list[int], output: Any) -> None:
        """Check the greedy tokens of an output, and the log-probabilities that they were drawn from."""
        key = (*prompt, *output["token_ids"][:-1])
        if key not in self._known:
            self._known[key] = self.logprobs([*key])[-NUM_TOKENS:]
        rows = self._known[key]
        assert output["token_ids"] == rows.argmax(-1).tolist()
        for row, entry in zip(rows, output["logprobs"], strict=True):
            expected = row.topk(NUM_TOP)
            values = dict(zip(expected.indices.tolist(), expected.values.tolist(), strict=True))
            assert set(entry) == set(values)
            assert all(abs(entry[token_id] - value) < TOLERANCE for token_id, value in values.items())


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=NUM_TOP, ignore_eos=True)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(smollm2_folder())


@pytest.fixture(scope="module")
def reference(folder: str) -> Reference:
    return Reference(folder)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_mooncake] if name == "mooncake" else []) for name in SYSTEMS]
)
def test_every_mode_gives_the_tokens_and_logprobs_of_transformers(name: str, reference: Reference) -> None:
    which, system = SYSTEMS[name]
    prompts = reference.prompts[which]
    with LLM("smollm2", **SETTINGS, **system) as llm:
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(llm.generate, prompts, GREEDY)
            for manager in llm.supervisors.values():
                assert manager.request_sm_reallocation(SMAllocation(60, 40))
                assert manager.wait_until_settled(DEADLINE_S)
            outputs = generating.result(DEADLINE_S)
        for prompt, output in zip(prompts, outputs, strict=True):
            reference.check(prompt, output)
        assert_no_leaks(llm)


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model, with a chat template that has tools."""
    made = tmp_path_factory.mktemp("model")
    for path in Path(folder).iterdir():
        (made / path.name).symlink_to(path)
    (made / "chat_template.jinja").unlink()
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return str(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llm(tools_folder: str) -> AsyncIterator[DisaggregatedLLM]:
    config = PdDisaggConfig.from_arguments(tools_folder, mode="unified", **SETTINGS)
    async with DisaggregatedLLM(config) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(llm: DisaggregatedLLM) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(llm.engine, llm.client) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client,
    ):
        yield client


over_http = pytest.mark.asyncio(loop_scope="module")


@over_http
async def test_a_unified_system_gives_the_tokens_and_logprobs_of_transformers(
    llm: DisaggregatedLLM, reference: Reference
) -> None:
    outputs = await llm.generate(reference.prompts, GREEDY)
    for prompt, output in zip(reference.prompts, outputs, strict=True):
        reference.check(prompt, output)
    await asyncio.to_thread(assert_no_leaks, llm)


@over_http
async def test_the_perplexity_of_a_text_is_that_of_transformers(
    client: openai.AsyncOpenAI, reference: Reference
) -> None:
    text = (ROOT / "README.md").read_text()[:1500]
    ids = reference.tokenizer.encode(text)
    answer = await client.completions.create(model=MODEL, prompt=text, echo=True, logprobs=0, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == text == answer.choices[0].text
    first, *values = logprobs.token_logprobs or []
    assert first is None
    expected = reference.logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert len(values) == len(expected)
    assert math.exp(-sum(values) / len(values)) == pytest.approx(math.exp(-expected.mean().item()), rel=1e-4)
    assert max(abs(value - score) for value, score in zip(values, expected.tolist(), strict=True)) < TOLERANCE


def fits_weather(text: str) -> bool:
    document = json.loads(text)
    return set(document) == {"city", "days"} and document["city"] in ("Rome", "Oslo") and 1 <= document["days"] <= 9


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}},
        fits_weather,
    ),
    "regex": (
        {"extra_body": {"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}🙂"}}},
        lambda text: re.fullmatch("[0-9]{3}-[a-z]{2}🙂", text) is not None,
    ),
    "choice": (
        {"extra_body": {"structured_outputs": {"choice": ["Rome", "München", "日本"]}}},
        ["Rome", "München", "日本"].__contains__,
    ),
}


@over_http
async def test_streams_and_structured_outputs(client: openai.AsyncOpenAI) -> None:
    """A stream adds up to the whole answer, whatever form it has."""

    async def whole(**options: Any) -> str:
        answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
        assert answer.choices[0].finish_reason in ("stop", "length")
        return answer.choices[0].message.content or ""

    async def streamed(**options: Any) -> str:
        chunks = await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **options)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    cases = [{"max_tokens": 12}, *(form | {"max_tokens": 60} for form, _ in FORMS.values())]
    texts = await asyncio.gather(*(make(temperature=0, **case) for case in cases for make in (whole, streamed)))
    assert texts[::2] == texts[1::2]
    assert "Rome" in texts[0]
    for text, (name, (_, fits)) in zip(texts[2::2], FORMS.items(), strict=True):
        assert fits(text), (name, text)


@over_http
async def test_calls_of_tools(client: openai.AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "function": FUNCTION}
    options: Any = {"model": MODEL, "temperature": 0, "tools": [tool], "max_tokens": 60}
    messages: list[Any] = [{"role": "user", "content": "How will the weather be in Oslo in the next 3 days?"}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer, chunks = await asyncio.gather(
        client.chat.completions.create(messages=messages, tool_choice=named, **options),
        client.chat.completions.create(messages=messages, tool_choice=named, stream=True, **options),
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert fits_weather(call.function.arguments)
    changes = [change async for chunk in chunks for change in chunk.choices[0].delta.tool_calls or []]
    assert "".join(change.function.arguments or "" for change in changes) == call.function.arguments
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Snow."}]
    final = await client.chat.completions.create(messages=messages, **options)
    assert final.choices[0].message.content or final.choices[0].message.tool_calls


@over_http
async def test_responses(client: openai.AsyncOpenAI) -> None:
    """The same model behind the Responses API: the chat's text, events, a continued response, forms and calls."""
    options: Any = {"model": MODEL, "temperature": 0}
    question = QUESTION[0]["content"]
    weather: Any = {"format": {"type": "json_schema", "name": "weather", "schema": WEATHER, "strict": True}}
    response, stream, formed, called, chat = await asyncio.gather(
        client.responses.create(input=question, max_output_tokens=12, **options),
        client.responses.create(input=question, max_output_tokens=12, stream=True, **options),
        client.responses.create(input=question, max_output_tokens=60, text=weather, **options),
        client.responses.create(
            input="How will the weather be in Oslo in the next 3 days?",
            max_output_tokens=60,
            tools=[{"type": "function", **FUNCTION}],
            tool_choice="required",
            parallel_tool_calls=False,
            **options,
        ),
        client.chat.completions.create(messages=QUESTION, max_tokens=12, **options),
    )
    text = chat.choices[0].message.content
    assert response.output_text == text
    assert response.usage.output_tokens == chat.usage.completion_tokens
    events = [event async for event in stream]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.output_text == text
    assert fits_weather(formed.output_text)
    [call] = called.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert fits_weather(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Snow."}
    later = await client.responses.create(
        input=[result], previous_response_id=called.id, max_output_tokens=4, **options
    )
    assert later.output_text
    stored = await client.responses.retrieve(later.id)
    assert stored.output_text == later.output_text

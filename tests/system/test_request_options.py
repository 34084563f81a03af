"""Parameters that vLLM's clients send: forms of output, banned and allowed tokens, prompts, salts, token ids."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from hbserve.errors import InvalidRequestError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.pd_disagg import LLM
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import assert_no_leaks
from tests.support.http_server import MODEL, USER, letters, served
from tests.support.paths import ROOT
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("options")))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prefill and decode instances of the demo model."""
    model = str(ROOT / "examples" / "models" / "hbserve-demo")
    with LLM(model, device="cpu", dtype="float32", num_blocks=256, log_level="WARNING") as llm:
        yield llm


@pytest.fixture
async def real(llm: LLM) -> AsyncIterator[httpx.AsyncClient]:
    """A server in this process's event loop, over the running instances."""
    client = EngineClient(llm._llm._address)
    await client.connect()
    ready = await client.wait_ready(DEADLINE_S)
    engine = TextEngine(client, llm._llm.engine.tokenizer, ready.max_model_len, ready.vocab_size)
    async with served(engine, client) as address, httpx.AsyncClient(base_url=address, timeout=60) as http:
        yield http
    await client.close()


async def ask(http: httpx.AsyncClient, path: str, stream: bool, **body: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of the first choice, and the documents of the answer: one, or the chunks of the stream."""
    start: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "x"}
    answer = await http.post(path, json=start | {"model": MODEL, "stream": stream} | body)
    assert answer.status_code == 200, (body, answer.text)
    if not stream:
        documents = [answer.json()]
    else:
        *lines, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert done == "[DONE]", done
        documents = [json.loads(line) for line in lines]
    choices = [choice for document in documents for choice in document["choices"] if choice["index"] == 0]
    texts = [choice.get("text") or choice.get("delta", choice.get("message", {})).get("content") for choice in choices]
    return "".join(text or "" for text in texts), documents


async def refused(http: httpx.AsyncClient, path: str, param: str, **body: Any) -> None:
    start: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "x"}
    answer = await http.post(path, json=start | body)
    assert answer.status_code == 400, (body, answer.text)
    assert answer.json()["error"]["param"] == param, answer.text
    assert param.split(".")[0] in answer.json()["error"]["message"]


# --- by the real engine --------------------------------------------------------------------------


ANIMAL = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_structured_outputs_of_every_kind(real: httpx.AsyncClient, path: str, stream: bool) -> None:
    more = {"max_tokens": 300, "seed": 2, "temperature": 0.8}
    for schema in (ANIMAL, json.dumps(ANIMAL)):
        text, _ = await ask(real, path, stream, structured_outputs={"json": schema}, **more)
        assert json.loads(text)["kind"] in ("dog", "cat")
    for form, texts in (
        ({"choice": ["yes", 'a "no"\n', "vielleicht/ä"]}, {"yes", 'a "no"\n', "vielleicht/ä"}),
        ({"regex": r"^1\d{3}/2$"}, {f"1{number:03}/2" for number in range(1000)}),
        ({"grammar": 'start: "a" b\nb: "b" | "c"'}, {"ab", "ac"}),
        ({"grammar": 'root ::= "a" rest\nrest ::= "b" | "c"', "regex": None, "json_object": False}, {"ab", "ac"}),
    ):
        text, documents = await ask(real, path, stream, structured_outputs=form, **more)
        assert text in texts
        assert documents[-1]["choices"][0]["finish_reason"] == "stop"


async def test_bad_words_never_appear_however_they_are_cut_into_tokens(real: httpx.AsyncClient) -> None:
    request: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    plain, _ = await ask(real, CHAT, False, **request)
    banned = [plain[1:3], plain.split()[0][:4]]
    for path in (CHAT, TEXT):
        for stream in (False, True):
            text, _ = await ask(real, path, stream, **request, bad_words=banned)
            assert text
            assert not [word for word in banned if word in text]


async def test_only_allowed_tokens_are_sampled(real: httpx.AsyncClient, llm: LLM) -> None:
    tokenizer = llm._llm.engine.tokenizer
    allowed = [tokenizer.encode(text)[0] for text in "abc"]
    for path in (CHAT, TEXT):
        for temperature in (0, 1):
            for stream in (False, True):
                body = {"allowed_token_ids": allowed, "temperature": temperature, "max_tokens": 8, "seed": 1}
                _, documents = await ask(real, path, stream, **body, return_token_ids=True, top_k=5)
                ids = [token for one in documents for choice in one["choices"] for token in choice.get("token_ids", ())]
                assert len(ids) == 8
                assert set(ids) <= set(allowed)


async def test_two_salts_never_share_cached_kv(real: httpx.AsyncClient, llm: LLM) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 8

    async def cached(**body: Any) -> int:
        _, [answer] = await ask(real, TEXT, False, prompt=prompt, max_tokens=2, **body)
        number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return number

    for salt in ({"cache_salt": "one"}, {"cache_salt": "two"}, {}):
        assert await cached(**salt) == 0
    for salt in ({"cache_salt": "one"}, {"cache_salt": "two"}, {}, {"cache_salt": ""}):
        assert await cached(**salt) > 0
    assert_no_leaks(llm)


# --- over a scripted scheduler -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_stop_string_is_in_the_text_if_the_request_wants_it(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, path: str, stream: bool
) -> None:
    scheduler.script = tokens(*letters(tokenizer, "one. two"))
    body: dict[str, Any] = {"stop": [". t", "never"], "max_tokens": 20}
    assert (await ask(http, path, stream, **body))[0] == "one"
    assert (await ask(http, path, stream, **body, include_stop_str_in_output=True))[0] == "one. t"
    [stop] = letters(tokenizer, "w")
    body = {"stop_token_ids": [stop], "max_tokens": 20}
    assert (await ask(http, path, stream, **body))[0] == "one. t"
    assert (await ask(http, path, stream, **body, include_stop_str_in_output=True))[0] == "one. tw"


async def test_prompts_are_truncated_from_the_left(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    ids = letters(tokenizer, "abcdefgh") * 20  # longer than the context of 96 tokens
    for number, kept in ((3, 3), (3.0, 3), (-1, 91), (95, 95)):
        body = {"prompt": ids, "truncate_prompt_tokens": number, "max_tokens": 5 if kept < 95 else 1}
        _, [answer] = await ask(http, TEXT, False, **body)
        assert scheduler.requests[-1].prompt_token_ids == ids[-kept:]
        assert answer["usage"]["prompt_tokens"] == kept
    text, _ = await ask(http, TEXT, False, prompt="xyz abc", truncate_prompt_tokens=1, echo=True, max_tokens=1)
    assert text.startswith(tokenizer.decode(tokenizer.encode("xyz abc")[-1:]))
    whole = tokenizer.encode_chat(USER)
    await ask(http, CHAT, False, truncate_prompt_tokens=4)
    assert scheduler.requests[-1].prompt_token_ids == whole[-4:]
    await ask(http, CHAT, False, truncate_prompt_tokens=90)
    assert scheduler.requests[-1].prompt_token_ids == whole
    for nothing in (None, 0):
        await refused(http, TEXT, "prompt", prompt=ids, truncate_prompt_tokens=nothing)
    await refused(http, TEXT, "truncate_prompt_tokens", truncate_prompt_tokens=-2)


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_of_prompt_and_output(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = [*letters(tokenizer, "hé"), 2]
    scheduler.script = tokens(*ids)
    for path, prompt in ((CHAT, tokenizer.encode_chat(USER)), (TEXT, tokenizer.encode("x"))):
        _, documents = await ask(http, path, stream, return_token_ids=True, n=2)
        choices = [choice for document in documents for choice in document["choices"]]
        for index in (0, 1):
            found = [choice.get("token_ids", []) for choice in choices if choice["index"] == index]
            assert [token for part in found for token in part] == ids
        holders = documents if path == CHAT else choices
        assert next(holder["prompt_token_ids"] for holder in holders if "prompt_token_ids" in holder) == prompt
        _, documents = await ask(http, path, stream)
        assert "token_ids" not in json.dumps(documents)


@pytest.mark.parametrize("content", ["hel", [{"type": "text", "text": "hel"}]])
async def test_an_answer_continues_the_last_message(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, content: Any
) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    for more in ({}, {"add_generation_prompt": False}, {"chat_template": tiny_tokenizers.CHAT_TEMPLATE}):
        await ask(http, CHAT, False, messages=messages, continue_final_message=True, **more)
        prompt = tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)
        assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhel"
    await ask(http, CHAT, False, add_generation_prompt=False)
    prompt = tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"
    both = {"add_generation_prompt": True, "continue_final_message": True}
    await refused(http, CHAT, "continue_final_message", messages=messages, **both)


async def test_a_request_may_bring_its_own_chat_template(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    template = (
        "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}{{ mood }}{% endif %}"
        "{% if add_generation_prompt %}BOT:{% endif %}{{ eos_token }}"
    )
    options = {"chat_template_kwargs": {"mood": "glad "}}
    await ask(http, CHAT, False, chat_template=template, **options)
    ids = scheduler.requests[-1].prompt_token_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "USER: higlad BOT:<|im_end|>"
    answer = await http.post("/tokenize", json={"messages": USER, "chat_template": template, **options})
    assert answer.json()["tokens"] == ids
    await refused(http, CHAT, "chat_template_kwargs", chat_template="{{ messages }}", **options)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 9 ** 9999999999 }}",
        "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include '/etc/passwd' %}",
    ],
)
async def test_a_hostile_chat_template_ends_alone(http: httpx.AsyncClient, template: str) -> None:
    await refused(http, CHAT, "chat_template", chat_template=template)
    await ask(http, CHAT, False)


async def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for path in (CHAT, TEXT):
        for param, body in (
            ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
            ("structured_outputs", {"structured_outputs": {"regex": "("}}),
            ("structured_outputs", {"structured_outputs": {"regex": r"\bword\b"}}),
            ("structured_outputs", {"structured_outputs": {"json": "{"}}),
            ("structured_outputs", {"structured_outputs": {"json": {"type": "no such type"}}}),
            ("structured_outputs", {"structured_outputs": {"grammar": "root ::= ("}}),
            ("structured_outputs", {"structured_outputs": {"json_object": True}, "grammar": "start: /a/"}),
            ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
            ("structured_outputs.choice", {"structured_outputs": {"choice": "ab"}}),
            ("bad_words", {"bad_words": ["a"], "grammar": "start: /a/"}),
            ("bad_words", {"bad_words": ["a"], "ignore_eos": True}),
            ("bad_words", {"bad_words": [""]}),
            ("bad_words", {"bad_words": ["a"], "allowed_token_ids": [5]}),
            ("allowed_token_ids", {"allowed_token_ids": [10**6]}),
            ("allowed_token_ids", {"allowed_token_ids": [5], "grammar": "start: /a/"}),
            ("allowed_token_ids", {"allowed_token_ids": [2], "min_tokens": 2}),
            ("cache_salt", {"cache_salt": 5}),
        ):
            await refused(http, path, param, **body)
    await refused(http, CHAT, "bad_words", bad_words=["a"], tools=[tool])
    await refused(
        http, CHAT, "structured_outputs", structured_outputs={"regex": "a"}, response_format={"type": "json_object"}
    )


def test_python_users_have_the_same_parameters() -> None:
    wrong: list[dict[str, Any]] = [
        {"bad_words": ["a"], "min_tokens": 1},
        {"allowed_token_ids": []},
        {"cache_salt": "\ud83d"},
    ]
    for more in wrong:
        with pytest.raises(InvalidRequestError):
            SamplingParams(**more)

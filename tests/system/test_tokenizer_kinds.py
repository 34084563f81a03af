"""The HTTP API with tokenizers of every kind: streams, counts, stop strings and logprobs agree on one text.

The scripted scheduler answers with random tokens, the same for the same seed. They contain all broken characters,
spaces and special tokens that a model could write.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve.errors import InvalidRequestError
from hbserve.grammar import Vocabulary, json_schema
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, USER
from tests.support.scripted_scheduler import ScriptedScheduler, output

KINDS = {
    "byte_level": tiny_tokenizers.byte_level,
    "llama3": tiny_tokenizers.llama3,
    "byte_fallback": lambda folder: tiny_tokenizers.byte_fallback(folder, tiny_tokenizers.CHAT_TEMPLATE),
    "metaspace": tiny_tokenizers.metaspace,
}
NUM_TOKENS = 40


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(KINDS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def script(scheduler: ScriptedScheduler, tokenizer: Tokenizer) -> None:
    async def random_tokens(request: AddRequest) -> AsyncIterator[RequestOutput]:
        rng = random.Random(request.sampling.seed)
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(request.sampling.max_tokens or 0)]
        while ids:  # steps of one token, and bursts of several
            size = rng.choice((1, 1, 2, 5))
            chunk, ids = ids[:size], ids[size:]
            yield output(request, *chunk, finish_reason=None if ids else "length")

    scheduler.script = random_tokens


async def completion(http: httpx.AsyncClient, **body: Any) -> dict[int, dict[str, Any]]:
    """Return the choices by number, after checking that a stream has the same ones."""
    body = {"model": MODEL, "prompt": "Hello wörld", "max_tokens": NUM_TOKENS, "seed": 5, **body}
    answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
    whole = {choice["index"]: choice for choice in answer["choices"]}
    streamed: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in await events(http, "/v1/completions", body):
        usage = chunk["usage"]
        for choice in chunk["choices"]:
            known = streamed.setdefault(choice["index"], choice | {"text": "", "logprobs": None})
            known["text"] += choice["text"]
            known |= {name: choice[name] for name in ("finish_reason", "stop_reason")}
            if choice["logprobs"]:
                earlier = known["logprobs"] or {key: [] for key in choice["logprobs"]}
                known["logprobs"] = {name: earlier[name] + part for name, part in choice["logprobs"].items()}
    assert streamed == whole
    assert usage == answer["usage"]
    return whole


async def events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    *lines, done = [line for line in answer.raise_for_status().text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.usefixtures("script")
async def test_completions_are_one_text(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    choices = await completion(http, n=3, logprobs=2)
    text: str = choices[0]["text"]
    assert len({choice["text"] for choice in choices.values()}) == 3
    assert (await completion(http))[0]["text"] == text

    # Each token begins at its offset, unless it is a part of a character or is not shown.
    special = {tokenizer.token_bytes(token_id).decode() for token_id in range(5)}
    for choice in choices.values():
        names, begins = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert len(names) == NUM_TOKENS
        for name, begin, end in zip(names, begins, [*begins[1:], len(choice["text"])], strict=True):
            shown = choice["text"][begin:end]
            if name not in special and not name.startswith("bytes:") and "\ufffd" not in shown:
                assert shown == name

    # echo returns the prompt's text, or the text of its tokens.
    ids = tokenizer.encode("Hello wörld")
    assert (await completion(http, echo=True))[0]["text"] == f"Hello wörld{text}"
    assert (await completion(http, echo=True, prompt=ids))[0]["text"] == tokenizer.decode(ids) + text

    # The text ends before the first stop string.
    for begin, end in ((0, 1), (2, 3), (5, 9), (11, 17), (20, 22)):
        stop = text[begin:end]
        [choice] = (await completion(http, stop=["never there", stop], logprobs=0)).values()
        assert choice["text"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


@pytest.mark.usefixtures("script")
async def test_chats_are_one_text(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"model": MODEL, "messages": USER, "seed": 7, "logprobs": True, "max_completion_tokens": NUM_TOKENS}
    body["skip_special_tokens"] = False
    answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
    [choice] = answer["choices"]
    raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert raw.decode("utf-8", "replace") == choice["message"]["content"]
    chunks = [chunk["choices"] for chunk in await events(http, "/v1/chat/completions", body)]
    assert "".join(one["delta"].get("content", "") for [one] in chunks[:-1]) == choice["message"]["content"]
    assert [entry for [one] in chunks[:-1] for entry in (one["logprobs"] or {}).get("content", [])] == choice[
        "logprobs"
    ]["content"]


def test_every_kind_can_write_json(tokenizer: Tokenizer) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"kind": {"enum": ["cat", "dög"]}}, "required": ["kind"]}
    schema["additionalProperties"] = False
    end = tokenizer.vocab_size
    matcher = Vocabulary(read_vocabulary(tokenizer.path), end + 8).follow(json_schema(schema), [end])
    rng = random.Random(1)
    ids: list[int] = []
    while not ids or ids[-1] != end:
        words = matcher.mask()
        ids.append(rng.choice([i for i in range(end + 1) if words[i // 32] >> (i % 32) & 1]))
        if ids[-1] != end:
            matcher.advance(ids[-1:])
    decoder = tokenizer.text_decoder(skip_special_tokens=True)
    assert json.loads("".join(decoder.feed(token_id) for token_id in ids))["kind"] in ("cat", "dög")


def test_a_tokenizer_that_grammars_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="structured output does not work with this tokenizer"):
        Vocabulary(read_vocabulary(tiny_tokenizers.word_pieces(tmp_path)), 200)

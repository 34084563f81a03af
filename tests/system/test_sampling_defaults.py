"""The sampling parameters that a model recommends are the defaults of requests that do not give them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve import LLM, SamplingParams
from hbserve.errors import ConfigError, HBServeError, ModelError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.model_files import read_sampling_defaults
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, served
from tests.support.model_zoo import save_model
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens

RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the cat", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}


@pytest.fixture
async def http(client: EngineClient, tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    ready = await client.wait_ready(DEADLINE_S)
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED | {"do_sample": True}))
    defaults = read_sampling_defaults(tmp_path)
    engine = TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size, sampling_defaults=defaults)
    async with served(engine, client) as url, httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        yield http


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": None, "top_k": None},
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 1, "repetition_penalty": 1},
        {"top_k": 0, "min_p": 0.0},
        {"top_k": -1},
    ],
)
async def test_given_parameters_win_and_the_model_gives_the_others(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, path: str, given: dict[str, Any]
) -> None:
    """A value that equals HBServe's own default, or is 0, is given, too; null is not."""
    scheduler.script = tokens(70, 71)
    response = await http.post(path, json={"model": MODEL} | BODIES[path] | given)
    assert response.status_code == 200, response.text
    sampling = scheduler.requests[0].sampling
    expected = RECOMMENDED | {name: value for name, value in given.items() if value is not None}
    assert {name: getattr(sampling, name) for name in expected} == expected
    assert sampling.presence_penalty == 0


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2.5}, "top_k"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"min_p": [0.1]}, "min_p"),
        ({"temperature": True}, "temperature"),
    ],
)
def test_recommendations_that_cannot_be_honoured_are_refused_by_file_and_key(
    content: dict[str, Any], key: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"generation_config.json: {key}.*generation_config: none"):
        read_sampling_defaults(tmp_path)


def test_what_the_file_does_not_say_is_no_default(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}
    content = {"temperature": None, "top_k": 20.0, "do_sample": False, "max_new_tokens": 7, "eos_token_id": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_sampling_defaults(tmp_path) == {"top_k": 20}


def test_an_embedding_program_gets_them_where_it_gives_no_parameters(tmp_path: Path) -> None:
    """With ``generation_config: none`` they count nowhere, and a file with wrong values does not matter."""
    save_model(tmp_path, "qwen2")
    tiny_tokenizers.byte_level(tmp_path)
    options: dict[str, Any] = {"device": "cpu", "mode": "unified", "num_blocks": 16, "log_level": "WARNING"}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 1}))
    with LLM(str(tmp_path), **options) as llm:
        greedy = llm.generate("the cat", SamplingParams(temperature=0))[0]["token_ids"]
        assert llm.generate("the cat")[0]["token_ids"] == greedy
        assert llm.generate(["the cat"] * 2)[1]["token_ids"] == greedy
        assert llm.generate("the cat", SamplingParams(seed=1))[0]["token_ids"] != greedy
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": "all"}))
    with pytest.raises(HBServeError, match=r"generation_config.json: top_k"):
        LLM(str(tmp_path), **options)
    with pytest.raises(ConfigError, match="generation_config"):
        LLM(str(tmp_path), generation_config="vllm", **options)
    (tmp_path / "config.json").unlink()  # seen before a process is started
    with pytest.raises(ModelError, match=f"cannot read {tmp_path}/config.json: No such file or directory"):
        LLM(str(tmp_path), **options)

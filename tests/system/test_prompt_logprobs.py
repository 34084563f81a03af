"""Log-probabilities of the prompt: what transformers gives in float32, in every mode, through Python and over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.errors import InvalidRequestError
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import assert_no_leaks, random_prompt
from tests.support.http_server import MODEL, served
from tests.support.model_zoo import save_model
from tests.support.scripted_scheduler import DEADLINE_S

TOLERANCE = 1e-4
LENGTHS = [1, 2, 16, 17, 33, 100, 257, 320]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 320,
    "num_blocks": 256,
    "chunk_size": 32,
    "log_level": "WARNING",
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "unified": {"mode": "unified"},
    "disaggregated": {"mode": "disaggregated", "local_prefill_tokens": 16},
    "semi_pd": {"mode": "semi_pd"},
    "two_ranks": {"mode": "unified", "tensor_parallel_size": 2},
    "whole_prompts": {"mode": "unified", "chunked_prefill_enabled": False},
    "few_blocks": {"mode": "unified", "num_blocks": 22, "decode_headroom_tokens": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A random Granite, with factors of everything, and its folder."""
    folder = tmp_path_factory.mktemp("granite")
    return str(folder), save_model(folder, "granite")


@pytest.fixture(scope="module", params=SYSTEMS)
def llm(request: pytest.FixtureRequest, model: tuple[str, Any]) -> Iterator[LLM]:
    with LLM(model[0], **(SETTINGS | SYSTEMS[request.param])) as running:
        yield running
        if request.param == "few_blocks":
            assert running.get_system_stats()["cpu_scheduler"]["preemptions"] > 0
        assert_no_leaks(running)


@torch.inference_mode()
def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    """Row i: log-probabilities of the token after position i."""
    logprobs: torch.Tensor = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return logprobs


def check(
    scores: list[dict[int, float] | None] | None, prompt: list[int], expected: torch.Tensor, num_top: int
) -> None:
    assert scores is not None
    assert len(scores) == len(prompt)
    assert scores[0] is None
    for position, values in enumerate(scores[1:], 1):
        row = expected[position - 1]
        assert values is not None
        assert set(values) == {prompt[position], *row.topk(num_top).indices.tolist()}
        assert all(abs(value - row[token_id]) < TOLERANCE for token_id, value in values.items())


def test_they_are_those_of_transformers_and_never_come_from_the_cache(llm: LLM, model: tuple[str, Any]) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    expected = [reference(model[1], prompt) for prompt in prompts]
    only_prompt = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=3)
    with_output = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=2)
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = llm.generate(prompts, only_prompt, use_tqdm=False)  # they seal the blocks of their prompts
    assert all(output["token_ids"] == [] and output["text"] == "" for output in outputs)
    assert {output["finish_reason"] for output in outputs} == {"length"}
    whole = prompts.pop()  # a prompt that fills the context can only be scored
    assert len(whole) == SETTINGS["max_model_len"]
    check(outputs.pop()["prompt_logprobs"], whole, expected.pop(), 3)
    for sampling in (with_output, SamplingParams(max_tokens=None, prompt_logprobs=0)):
        with pytest.raises(InvalidRequestError, match="unless max_tokens is 0"):
            llm.generate(whole, sampling, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="maximum context length is 320"):
        llm.generate([*whole, 1], only_prompt, use_tqdm=False)
    again = llm.generate(prompts, with_output, use_tqdm=False)
    assert [output["num_cached_tokens"] for output in again] == [0] * len(prompts)
    for number, prompt in enumerate(prompts):
        check(outputs[number]["prompt_logprobs"], prompt, expected[number], 3)
        check(again[number]["prompt_logprobs"], prompt, expected[number], 2)
    cached = llm.generate(prompts, plain, use_tqdm=False)
    assert [output["token_ids"] for output in cached] == [output["token_ids"] for output in again]
    assert all(output["prompt_logprobs"] is None for output in cached)


def test_samples_beside_other_requests_and_the_ones_of_the_output(llm: LLM, model: tuple[str, Any]) -> None:
    prompts = [random_prompt(90, seed=1)] * 3
    several = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=4, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate(prompts, [several, plain, several], use_tqdm=False)
    for output in (outputs[0], outputs[2]):
        check(output["prompt_logprobs"], prompts[0], reference(model[1], prompts[0]), 0)
        assert [len(sample["logprobs"] or ()) for sample in output["samples"]] == [4] * 3


def test_limits() -> None:
    for wrong in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True}):
        with pytest.raises(InvalidRequestError, match="prompt_logprobs"):
            SamplingParams(**wrong)
    for name in ("logprobs", "prompt_logprobs"):
        all_of_them: dict[str, Any] = {name: -1}
        with pytest.raises(InvalidRequestError, match="-1, for all tokens of the vocabulary, is not supported"):
            SamplingParams(**all_of_them)
    with pytest.raises(InvalidRequestError, match="max_tokens must be at least 1, or 0 with prompt_logprobs"):
        SamplingParams(max_tokens=0)


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tokenizer]:
    """A model whose prompts begin with a special token."""
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("llama"))
    return folder, save_model(folder, "llama", vocab_size=384), Tokenizer(folder)


@pytest.fixture
async def http(text_model: tuple[Path, Any, Tokenizer]) -> AsyncIterator[httpx.AsyncClient]:
    config = PdDisaggConfig.from_arguments(str(text_model[0]), mode="unified", **SETTINGS)
    async with (
        DisaggregatedLLM(config) as llm,
        served(llm.engine, llm.client) as url,
        httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http,
    ):
        yield http


async def test_echo_and_prompt_logprobs_over_http(
    http: httpx.AsyncClient, text_model: tuple[Path, Any, Tokenizer]
) -> None:
    _, model, tokenizer = text_model
    text = "Hello wörld, this is a prompt of some length. " * 4
    ids = tokenizer.encode(text)
    expected = reference(model, ids)

    async def post(path: str = "completions", **body: Any) -> dict[str, Any]:
        response = await http.post(f"/v1/{path}", json={"model": MODEL, "temperature": 0} | body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(path: str, **body: Any) -> list[dict[str, Any]]:
        body = {"model": MODEL, "temperature": 0, "stream": True} | body
        lines = (await http.post(f"/v1/{path}", json=body)).text.splitlines()
        data = [line.removeprefix("data: ") for line in lines if line and line != "data: [DONE]"]
        return [choice for line in data for choice in json.loads(line)["choices"]]

    # Evaluation harnesses send token ids, and read the prompt's part of the choice's logprobs.
    for max_tokens in (0, 1):
        for prompt in (text, ids):
            answer = await post(prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
            (choice,) = answer["choices"]
            logprobs = choice["logprobs"]
            assert choice["text"].startswith(text)
            assert choice["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == max_tokens
            assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["top_logprobs"][0] is None
            for position in range(1, len(ids)):
                row = expected[position - 1]
                assert abs(logprobs["token_logprobs"][position] - row[ids[position]]) < TOLERANCE
                best = max(logprobs["top_logprobs"][position].values())
                assert abs(best - row.max()) < TOLERANCE
                offset = logprobs["text_offset"][position]
                token = logprobs["tokens"][position]
                assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert (await post(prompt=text, echo=True, max_tokens=0))["choices"][0]["text"] == text

    def check_entries(entries: list[dict[str, Any] | None], token_ids: list[int], num_top: int) -> None:
        assert len(entries) == len(token_ids)
        assert entries[0] is None
        rows = reference(model, token_ids)
        for position, entry in enumerate(entries[1:], 1):
            row, token_id = rows[position - 1], token_ids[position]
            assert entry is not None
            assert set(map(int, entry)) == {token_id, *row.topk(num_top).indices.tolist()}
            scored = entry[str(token_id)]
            assert abs(scored["logprob"] - row[token_id]) < TOLERANCE
            assert scored["rank"] == int((row > row[token_id]).sum()) + 1
            assert scored["decoded_token"] == tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    # vLLM's form; other numbers for the prompt than for the output; several prompts and samples.
    answer = await post(prompt=[text, "a"], n=2, max_tokens=3, logprobs=1, echo=True, prompt_logprobs=3)
    for choice in answer["choices"]:
        token_ids = ids if choice["index"] < 2 else tokenizer.encode("a")
        check_entries(choice["prompt_logprobs"], token_ids, 3)
        assert max(len(top) for top in choice["logprobs"]["top_logprobs"][1:]) <= 2
    messages = [{"role": "user", "content": text}]
    answer = await post("chat/completions", messages=messages, max_tokens=2, prompt_logprobs=1)
    check_entries(answer["prompt_logprobs"], tokenizer.encode_chat(messages), 1)
    assert "prompt_logprobs" not in await post("chat/completions", messages=messages, max_tokens=2)

    # A stream has them in the first chunk of each choice.
    whole = await post(prompt=text, echo=True, logprobs=2, max_tokens=5, prompt_logprobs=1)
    chunks = await stream("completions", prompt=text, echo=True, logprobs=2, max_tokens=5, prompt_logprobs=1)
    assert chunks[0]["prompt_logprobs"] == whole["choices"][0]["prompt_logprobs"]
    assert all("prompt_logprobs" not in chunk for chunk in chunks[1:])
    assert "".join(chunk["text"] for chunk in chunks) == whole["choices"][0]["text"]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values
    chunks = await stream("chat/completions", messages=messages, max_tokens=2, prompt_logprobs=1)
    check_entries(chunks[0]["prompt_logprobs"], tokenizer.encode_chat(messages), 1)

    refused = await http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 0})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"

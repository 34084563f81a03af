"""Many HTTP clients at once, of which some disconnect: the others get the right answers, and nothing stays open."""

from __future__ import annotations

import asyncio
import inspect
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve.config import ServerConfig
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.server import create_app, serve
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import greedy_reference, leaks, random_prompt
from tests.support.model_zoo import save_model

MODEL = "tiny"
DEADLINE_S = 120.0  # of every wait; only a hanging test comes near it
NUM_TOKENS = 20
NUM_CLIENTS = 200
NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model with a tokenizer, and its folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_tokenizers.byte_level(folder)
    return folder, save_model(folder, "qwen3", vocab_size=352)


@dataclass
class Ask:
    """A completion request; greedy by default."""

    prompt: list[int]
    num_tokens: int = NUM_TOKENS
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})

    @property
    def body(self) -> dict[str, Any]:
        own = {"model": MODEL, "prompt": self.prompt, "max_tokens": self.num_tokens, "ignore_eos": True}
        return {**own, **self.sampling, "skip_special_tokens": False, "stream": True}


@asynccontextmanager
async def server(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A real system behind a real HTTP server, and its client."""
    arguments: dict[str, Any] = {"device": "cpu", "dtype": "float32", "log_level": "WARNING", "max_model_len": 640}
    async with DisaggregatedLLM(PdDisaggConfig.from_arguments(str(folder), **(arguments | settings))) as llm:
        stop = asyncio.Event()
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        app = create_app(llm.engine, llm.client, MODEL)
        serving = asyncio.create_task(serve(app, ServerConfig(port=0), stop, listening.set_result, 1))
        url = f"http://127.0.0.1:{await asyncio.wait_for(listening, DEADLINE_S)}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=limits) as http:
            yield http
        stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)


async def stream(http: httpx.AsyncClient, ask: Ask, leave_after: int | None = None) -> str | None:
    """Return the streamed text, or None if the client disconnected after that many chunks."""
    text, ended = "", False
    async with http.stream("POST", "/v1/completions", json=ask.body) as response:
        if response.is_error:
            await response.aread()
            response.raise_for_status()
        num_chunks = 0
        async for line in response.aiter_lines():
            if num_chunks == leave_after:
                return None
            if not line:
                continue
            assert not ended, "something after [DONE]"
            data = line.removeprefix("data: ")
            ended = data == "[DONE]"
            if not ended:
                document = json.loads(data)
                assert "error" not in document, document
                text += document["choices"][0]["text"]
                num_chunks += 1
    assert ended, "the stream broke off"
    return text


async def leave_after_s(seconds: float, work: asyncio.Task[str | None]) -> None:
    """Cancel a client, in whatever state its request is."""
    await asyncio.sleep(seconds)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def until(what: Callable[[], Any] | Callable[[], Awaitable[Any]]) -> Any:
    """Poll until ``what()`` is true, and return it."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = what()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)


async def stats_of(http: httpx.AsyncClient) -> dict[str, Any]:
    """Return the present statistics of /stats."""
    stats: dict[str, Any] = (await http.get("/stats")).raise_for_status().json()
    return stats


async def settled_stats(http: httpx.AsyncClient) -> dict[str, Any]:
    """Return the statistics after all blocks and slots are free again."""

    async def if_settled() -> dict[str, Any] | None:
        stats = await stats_of(http)
        return None if leaks(stats) else stats

    stats: dict[str, Any] = await until(if_settled)
    return stats


async def test_two_hundred_streams_of_which_a_third_disconnect(model: tuple[Path, Any]) -> None:
    folder, reference = model
    tokenizer = Tokenizer(folder)
    rng = random.Random(20240607)
    prompts = [random_prompt(length, seed=length) for length in rng.sample(range(1, 300), NUM_PROMPTS)]
    # Too few blocks and slots for all requests: they queue, and running requests are preempted for lack of blocks.
    limits = {"mode": "disaggregated", "num_blocks": 256, "max_num_seqs": 48, "chunk_size": 64}
    async with server(folder, decode_headroom_tokens=0, **limits) as http:
        await settled_stats(http)
        tasks_before = asyncio.all_tasks()
        finishing: list[tuple[Ask, asyncio.Task[str | None]]] = []
        leaving: list[asyncio.Task[Any]] = []
        for _ in range(NUM_CLIENTS):
            index = rng.randrange(NUM_PROMPTS)
            ask = Ask(prompts[index])
            if index % 5 == 4:
                ask.sampling = {"temperature": 1.1, "top_p": 0.95, "seed": index}
            if rng.random() < 2 / 3:
                finishing.append((ask, asyncio.create_task(stream(http, ask))))
            elif rng.random() < 0.5:
                leaving.append(asyncio.create_task(stream(http, ask, leave_after=rng.randrange(NUM_TOKENS))))
            else:
                work = asyncio.create_task(stream(http, ask))
                leaving.append(asyncio.create_task(leave_after_s(rng.uniform(0, 3), work)))
        async with asyncio.timeout(DEADLINE_S):
            texts = await asyncio.gather(*(task for _, task in finishing))
            await asyncio.gather(*leaving)

        stats = await settled_stats(http)
        await until(lambda: not asyncio.all_tasks() - tasks_before)
        counts = stats["cpu_scheduler"]
        assert counts["failed_requests"] == counts["refused_requests"] == 0
        assert counts["completed_requests"] + counts["aborted_requests"] == counts["total_requests"]
        assert counts["completed_requests"] >= len(finishing)
        assert counts["aborted_requests"] > 0
        assert stats["kv_transfer"]["links"]["prefill-0->decode-0"]["failures"] == {}

        # The idle system still serves, and the same seed alone on it gives the same text.
        sampled = {ask.sampling["seed"]: ask for ask, _ in finishing if "seed" in ask.sampling}
        expected_sampled = {seed: await stream(http, ask) for seed, ask in sampled.items()}
    expected_greedy: dict[int, str] = {}
    for (ask, _), text in zip(finishing, texts, strict=True):
        if "seed" in ask.sampling:
            assert text == expected_sampled[ask.sampling["seed"]]
            continue
        if len(ask.prompt) not in expected_greedy:  # each prompt has a length of its own
            tokens = greedy_reference(reference, ask.prompt, NUM_TOKENS)
            expected_greedy[len(ask.prompt)] = tokenizer.decode(tokens, skip_special_tokens=False)
        assert text == expected_greedy[len(ask.prompt)]
    assert len(expected_greedy) > NUM_PROMPTS / 2
    assert len(set(expected_sampled.values())) == len(expected_sampled)


async def test_overload_is_refused_and_a_retry_is_served(model: tuple[Path, Any]) -> None:
    folder, reference = model
    tokenizer = Tokenizer(folder)
    ask = Ask(random_prompt(40, seed=1))
    expected = tokenizer.decode(greedy_reference(reference, ask.prompt, NUM_TOKENS), skip_special_tokens=False)
    num_refusals = 0

    async def insist(http: httpx.AsyncClient) -> str | None:
        nonlocal num_refusals
        while True:
            try:
                return await stream(http, ask)
            except httpx.HTTPStatusError as error:
                response = error.response
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "overloaded"
                assert "max_waiting_requests" in response.json()["error"]["message"]
                num_refusals += 1
                await asyncio.sleep(int(response.headers["Retry-After"]))

    async def seats_are_taken() -> bool:
        return bool((await stats_of(http))["gpu_instances"]["unified-0"]["active_requests"] == 2)

    instance = {"instance_id": "unified-0", "instance_type": "unified", "num_threads": 1}
    limits = {"num_blocks": 128, "max_num_seqs": 2, "max_waiting_requests": 4}
    async with server(folder, mode="unified", gpu_instances=[instance], **limits) as http:
        # While both slots are taken, four of the other requests may wait.
        held = [asyncio.create_task(stream(http, Ask([1 + n], num_tokens=600))) for n in range(2)]
        async with asyncio.timeout(DEADLINE_S):
            await until(seats_are_taken)
            texts = await asyncio.gather(*(insist(http) for _ in range(16)))
            await asyncio.gather(*held)
        assert set(texts) == {expected}
        assert num_refusals > 0
        stats = await settled_stats(http)
        never = await http.post("/v1/completions", json={"model": MODEL, "prompt": [1], "n": 5})
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "n"
        assert stats["cpu_scheduler"]["refused_requests"] == num_refusals
        assert stats["cpu_scheduler"]["completed_requests"] == 16 + 2

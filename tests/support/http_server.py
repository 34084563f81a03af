"""Fixtures: a running HTTP server over a scripted scheduler; and helpers of its tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve.config import ServerConfig
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.server import create_app, serve
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler

MODEL = "org/tiny"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def max_model_len() -> int:
    """The context length of the scripted model; a test module may replace it by a fixture of the same name."""
    return 96


@pytest.fixture
async def scheduler(tmp_path: Path, max_model_len: int) -> AsyncIterator[ScriptedScheduler]:
    async with ScriptedScheduler(tmp_path, max_model_len=max_model_len) as scheduler:
        yield scheduler


@pytest.fixture
async def client(scheduler: ScriptedScheduler) -> AsyncIterator[EngineClient]:
    client = EngineClient(scheduler.address)
    await client.connect()
    yield client
    await client.close()


@asynccontextmanager
async def served(engine: TextEngine, client: EngineClient) -> AsyncIterator[str]:
    """Serve an engine over HTTP on a loopback port; yield the server's address."""
    stop = asyncio.Event()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    app = create_app(engine, client, MODEL)
    serving = asyncio.create_task(serve(app, ServerConfig(port=0), stop, listening.set_result, 1))
    try:
        yield f"http://127.0.0.1:{await asyncio.wait_for(listening, DEADLINE_S)}"
    finally:
        stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)


@pytest.fixture
async def url(client: EngineClient, tokenizer: Tokenizer) -> AsyncIterator[str]:
    """The address of a running server."""
    ready = await client.wait_ready(DEADLINE_S)
    async with served(TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size), client) as address:
        yield address


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        yield http


@pytest.fixture
async def api(url: str) -> AsyncIterator[Any]:
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as api:
        yield api


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode the text with one token per byte."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


async def until(holds: Callable[[], bool]) -> None:
    """Poll until the condition is true."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

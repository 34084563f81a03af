"""Malformed requests, and clients that disconnect at any time: no status 5xx, and no request is left open."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.front_stub import EngineStub
from hbserve.config import ServerConfig, from_dict
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.server import create_app, http_protocol, live_page, serve
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.fair_gate import FairGate
from hbserve.server.guard import Guard
from hbserve.server.keys import Keys
from hbserve.server.protocol import CompletionRequest
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, USER, until
from tests.support.scheduler_parts import DEMO
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, output

schemathesis = pytest.importorskip("schemathesis")

BOUNDED = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


async def _three_tokens(request: AddRequest) -> AsyncIterator[RequestOutput]:
    for token_id, reason in ((50, None), (51, None), (52, "length")):
        yield output(request, token_id, finish_reason=reason)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A guarded server in a thread of its own, because the tests' tools are synchronous."""
    ready: list[str] = []
    is_ready = threading.Event()
    end: list[Any] = []

    async def run(folder: Path) -> None:
        tokenizer = Tokenizer(tiny_tokenizers.byte_level(folder / "tokenizer", tiny_tokenizers.TOOL_TEMPLATE))
        stop = asyncio.Event()
        end.append((asyncio.get_running_loop(), stop))
        async with ScriptedScheduler(folder, max_model_len=200) as scheduler:
            scheduler.script = _three_tokens
            client = EngineClient(scheduler.address)
            await client.connect()
            engine = TextEngine(client, tokenizer, 200, 400)
            config = ServerConfig(port=0, max_body_bytes=100_000)
            app = create_app(engine, client, MODEL, config)
            page_config = from_dict({"model": {"path": str(DEMO)}})
            live_page.install(app, page_config, None, engine, client, FairGate(), None, stop)

            def on_ready(port: int) -> None:
                ready.append(f"http://127.0.0.1:{port}")
                is_ready.set()

            await serve(Guard(app, config, Keys({}, None), FairGate(), stop), config, stop, on_ready, 1)
            assert engine.num_open == 0
            await client.close()

    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=lambda: asyncio.run(run(Path(folder))))
        thread.start()
        try:
            assert is_ready.wait(DEADLINE_S)
            yield ready[0]
        finally:
            loop, stop = end[0]
            loop.call_soon_threadsafe(stop.set)
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def http_once() -> Iterator[httpx.Client]:
    """One client for all requests: making one takes longer than a request."""
    with httpx.Client() as client:
        yield client


def test_openapi_description(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/tokenize"}
    for operation in operations:
        _try_out(operation)


def _try_out(operation: Any) -> None:
    @BOUNDED
    @given(operation.as_strategy())
    def send(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500, response.text
        assert response.headers["x-request-id"]
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    send()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields} - {"model"}))


@settings(parent=BOUNDED, max_examples=120)
@given(st.sampled_from(["/v1/completions", "/v1/chat/completions"]), st.dictionaries(NAMES, JSON, max_size=3))
def test_bodies_with_one_or_two_wrong_values(
    address: str, http_once: httpx.Client, path: str, odd: dict[str, Any]
) -> None:
    body = {"model": MODEL, **({"messages": USER} if "chat" in path else {"prompt": "x"}), "max_tokens": 3, **odd}
    answer = http_once.post(f"{address}{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text


@settings(parent=BOUNDED, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Authorization", "Content-Type", "X-Request-Id", "Accept", "Transfer-Encoding", "Expect"]),
            st.binary(max_size=60).filter(lambda value: not set(value) & {0, 10, 13}),
        ),
        max_size=4,
    ),
    st.binary(max_size=60),
)
def test_malformed_heads(address: str, http_once: httpx.Client, headers: list[tuple[str, bytes]], body: bytes) -> None:
    head = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers)
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert not answer.startswith(b"HTTP/1.1 5"), answer
    assert http_once.get(f"{address}/health").status_code == 200


class Front:
    """A server in this event loop, over an engine that sends tokens at once or almost at once."""

    stub: EngineStub
    engine: TextEngine
    gate: FairGate
    port: int


@pytest.fixture
async def front(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    front = Front()
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path))
    front.stub = EngineStub(f"ipc://{tmp_path}/stub", request.param, 400)
    running = asyncio.create_task(front.stub.run())
    client = EngineClient(f"ipc://{tmp_path}/stub")
    await client.connect()
    await client.wait_ready(DEADLINE_S)
    front.engine, front.gate, stop = TextEngine(client, tokenizer, 4096, 1000), FairGate(max_open=100), asyncio.Event()
    app = Guard(create_app(front.engine, client, MODEL), ServerConfig(), Keys({}, None), front.gate, stop)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the operating system's buffer for a slow reader
    front.port = listener.getsockname()[1]
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(app, listener, stop, listening.set_result, 1))
    await asyncio.wait_for(listening, DEADLINE_S)
    tasks_before = asyncio.all_tasks()
    yield front
    await until(
        lambda: (
            not (front.engine.num_open or front.stub.num_open or front.gate.num_waiting or front.gate._num_open)
            and asyncio.all_tasks() - tasks_before <= {asyncio.current_task()}
        )
    )
    assert client.num_open == 0
    stop.set()
    await asyncio.wait_for(serving, DEADLINE_S)
    await client.close()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    front.stub.close()


def completion_request(**body: Any) -> bytes:
    content = json.dumps({"model": MODEL, "prompt": "x", **body}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize("front", [0.02], indirect=True)
async def test_a_thousand_clients_that_disconnect_at_random(front: Front) -> None:
    rng = random.Random(7)
    finished = 0

    async def visit(number: int) -> None:
        nonlocal finished
        stays = number % 4 == 0
        whole = completion_request(max_tokens=5 if stays else 4000, stream=number % 3 > 0)
        await asyncio.sleep(rng.uniform(0, 2))
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        if stays:
            writer.write(whole)
            answer = await reader.read()
            assert b'"finish_reason":"length"' in answer, answer
            finished += 1
        else:
            how = rng.choice(["mid-request", "at once", "later", "half-closed", "reset"])
            writer.write(whole[: rng.randrange(len(whole))] if how == "mid-request" else whole)
            if how in ("later", "reset"):
                await asyncio.sleep(rng.uniform(0, 0.5))
            if how == "half-closed":  # taken as disconnected: it gets no answer
                writer.write_eof()
                await reader.read()
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(visit(number) for number in range(1000)))
        assert finished == 250


@pytest.mark.parametrize("front", [0.001], indirect=True)
async def test_clients_that_stop_reading(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hbserve.server.http_protocol")

    async def connect(request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", front.port))
        # With a limit of one byte, the stream reads from the socket only when the test asks for more.
        reader, writer = await asyncio.open_connection(sock=own, limit=1)
        writer.write(request)
        return reader, writer

    # Five clients send a request and read nothing. The engine finishes, and other clients are served meanwhile.
    big = {"prompt": "x" * 2000, "echo": True, "n": 64, "max_tokens": 50}  # more than fits into any buffer
    slow_request = completion_request(**big, stream=True, stream_options={"include_usage": True})
    async with asyncio.timeout(DEADLINE_S):
        slow = [await connect(slow_request) for _ in range(5)]
        await until(lambda: front.engine.num_open == 5)
        others = [await connect(completion_request(max_tokens=5, stream=True)) for _ in range(50)]
        for reader, writer in others:
            assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            writer.close()
        await until(lambda: front.stub.num_open == 0)
        assert front.engine.num_open == 5
        # The server kept the merged text for them, not a message per token.
        for reader, writer in slow:
            answer = await reader.read()
            assert b'"completion_tokens":3200' in answer
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert answer.count(b"data: {") < 1000
            writer.close()

    # Clients that never read, or never finish their request's head, are cut off.
    monkeypatch.setattr(http_protocol, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    unread = [await connect(request) for request in (slow_request, completion_request(**big), slow_request[:20], b"")]
    await until(lambda: sum("cut off a client" in record.message for record in caplog.records) == len(unread))
    for reader, writer in unread:
        with suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
            assert not answer.endswith(b"\r\n\r\n" if b"data:" in answer else b"}")
        writer.close()

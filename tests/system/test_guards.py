"""Keys, limits, turns and the end of a server, over real connections."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve.config import ServerConfig, from_dict
from hbserve.errors import ConfigError, RateLimitedError, ShuttingDownError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.process import log_format
from hbserve.server import create_app, received_body, serve
from hbserve.server.fair_gate import FairGate
from hbserve.server.guard import Guard
from hbserve.server.keys import Keys
from hbserve.tokenizer import Tokenizer
from tests.support.http_server import MODEL, until
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, output

ANN, BOB, ADMIN = "sk-ann-12345", "sk-bob-12345", "sk-admin-12345"
BODY = {"model": MODEL, "prompt": "x"}


class Server:
    """A guarded server with its client ``http``. Setting ``stop`` ends it; then ``ended`` is done."""

    http: httpx.AsyncClient
    stop: asyncio.Event
    ended: asyncio.Task[None]
    gate: FairGate


@asynccontextmanager
async def guarded(
    client: EngineClient,
    tokenizer: Tokenizer,
    keys: Keys | None = None,
    gate: FairGate | None = None,
    tls: tuple[str, str] | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    config = ServerConfig(port=0, **settings)
    engine = TextEngine(client, tokenizer, 96, 400, max_prompt_tokens=config.max_prompt_tokens)
    server = Server()
    server.stop, server.gate = asyncio.Event(), gate or FairGate()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    app = create_app(engine, client, MODEL, config)
    guard = Guard(app, config, keys or Keys({}, None), server.gate, server.stop)

    def hand_back() -> None:
        engine.end_all(ShuttingDownError("the server is shutting down"))

    drain_s = config.drain_timeout_s
    server.ended = asyncio.create_task(serve(guard, config, server.stop, listening.set_result, drain_s, hand_back, tls))
    port = await asyncio.wait_for(listening, DEADLINE_S)
    scheme = "http" if tls is None else "https"
    verify: Any = True if tls is None else ssl.create_default_context(cafile=tls[0])
    async with httpx.AsyncClient(base_url=f"{scheme}://localhost:{port}", timeout=DEADLINE_S, verify=verify) as http:
        server.http = http
        yield server
    server.stop.set()
    await asyncio.wait_for(server.ended, DEADLINE_S)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def keys_that_open(http: httpx.AsyncClient, method: str, path: str) -> dict[str | None, int]:
    """Return the status of an answer without a key, with a user's and with the administrator's. The body is empty."""
    found = {}
    for key in (None, ANN, ADMIN):
        headers = bearer(key) if key is not None else {}
        found[key] = (await http.request(method, path, headers=headers)).status_code
    return found


def held(scheduler: ScriptedScheduler) -> asyncio.Event:
    """An event: every request sends one token and waits for it before the next."""
    go_on = asyncio.Event()

    async def script(request: AddRequest) -> AsyncIterator[RequestOutput]:
        yield output(request, 70)
        await go_on.wait()
        yield output(request, 71, finish_reason="length")

    scheduler.script = script
    return go_on


async def test_keys(
    client: EngineClient, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "hbserve.access")
    async with guarded(client, tokenizer, Keys({ANN: "ann", BOB: "bob"}, ADMIN)) as server:
        http = server.http
        for headers in ({}, bearer("sk-wrong-12345"), {"Authorization": f"Basic {ANN}"}):
            answer = await http.post("/v1/completions", json=BODY, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for headers in (bearer(ANN), bearer(BOB), {"X-API-Key": ANN}, bearer(ADMIN)):
            assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        assert (await http.get("/stats")).status_code == 401
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/admin/anything", headers=bearer(ANN))).status_code == 401
        assert (await http.get("/admin/anything", headers=bearer(ADMIN))).status_code == 404
        assert await keys_that_open(http, "GET", "/v1/plan") == {None: 401, ANN: 404, ADMIN: 404}
        assert await keys_that_open(http, "POST", "/v1/plan") == {None: 401, ANN: 401, ADMIN: 400}
        for method, path in (("POST", "/v1/instances/a/role"), ("DELETE", "/v1/instances/a?timeout_s=0")):
            assert await keys_that_open(http, method, path) == {None: 401, ANN: 401, ADMIN: 400}
    assert " ann" in caplog.text
    assert not any(key in caplog.text for key in (ANN, BOB, ADMIN, "sk-wrong"))
    async with guarded(client, tokenizer) as server:
        assert await keys_that_open(server.http, "GET", "/v1/plan") == {None: 404, ANN: 404, ADMIN: 404}
        assert await keys_that_open(server.http, "POST", "/v1/instances/a/role") == {None: 403, ANN: 403, ADMIN: 403}
        assert (await server.http.post("/v1/completions", json=BODY)).status_code == 200
        assert (await server.http.get("/admin/anything", headers=bearer(ADMIN))).status_code == 403


def test_sources_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users, admin = tmp_path / "keys", tmp_path / "admin"
    users.write_text(f"# who may\nann {ANN}\n\n{BOB}\n")
    admin.write_text(ADMIN + "\n")
    users.chmod(0o600)
    admin.chmod(0o640)  # a group may read it
    monkeypatch.setenv("HBSERVE_API_KEYS", "sk-carl-12345,sk-dora-12345")
    keys = Keys.load(ServerConfig(api_keys_file=str(users), admin_key_file=str(admin)))
    assert [keys.name_of(key) for key in (ANN, "sk-carl-12345", ADMIN, "sk-nobody")] == ["ann", "key-1", "admin", None]
    assert keys.name_of(BOB) == "key-4"
    monkeypatch.delenv("HBSERVE_API_KEYS")
    assert not Keys.load(ServerConfig()).are_required
    with pytest.raises(ConfigError, match=r"server\.api_keys_file"):
        Keys.load(ServerConfig(api_keys_file=str(tmp_path / "missing")))
    (tmp_path / "empty").write_text("# nobody yet\n\n")
    (tmp_path / "empty").chmod(0o600)
    with pytest.raises(ConfigError, match="there is no key in"):
        Keys.load(ServerConfig(api_keys_file=str(tmp_path / "empty")))
    users.write_text("short\n")
    with pytest.raises(ConfigError, match="8 or more") as caught:
        Keys.load(ServerConfig(api_keys_file=str(users)))
    assert "short" not in str(caught.value)
    users.chmod(0o644)
    with pytest.raises(ConfigError, match=r"every user of this host may read .*; chmod 600 it"):
        Keys.load(ServerConfig(api_keys_file=str(users)))


async def test_limits_of_a_request(client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler) -> None:
    gate = FairGate(max_open=1)
    limits: dict[str, Any] = {"max_body_bytes": 1000, "max_prompt_tokens": 5, "request_timeout_s": 0.3}
    async with guarded(client, tokenizer, gate=gate, **limits) as server:
        http = server.http
        answer = await http.post("/v1/completions", json=BODY | {"user": "x" * 1000})
        assert (answer.status_code, "max_body_bytes" in answer.text) == (413, True)

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        answer = await http.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        answer = await http.post("/v1/completions", json=BODY | {"prompt": [50] * 6})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        assert (await http.post("/v1/completions", json=BODY | {"prompt": [50] * 5})).status_code == 200
        held(scheduler)
        answer = await http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        answer = await http.post("/v1/completions", json=BODY | {"stream": True})
        assert answer.status_code == 200
        assert '"code":"request_timeout"' in answer.text
        await scheduler.wait_for_aborts(2)
        await gate.enter("another")  # this client's request takes long: the time in the queue counts
        answer = await http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        gate.leave("another")
        assert gate.num_waiting == 0


async def test_request_ids(client: EngineClient, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hbserve.access")
    caplog.handler.setFormatter(log_format.JsonFormatter("api"))
    async with guarded(client, tokenizer) as server:
        answer = await server.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine-7"})
        assert answer.headers["X-Request-Id"] == "mine-7"
        given = [
            (await server.http.post(path, json=BODY, headers={"X-Request-Id": "no good " + "x" * 200})).headers[
                "X-Request-Id"
            ]
            for path in ("/v1/completions", "/v1/nothing")
        ]
        assert len({*given, "mine-7"}) == 3
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    assert [line["request_id"] for line in lines] == ["mine-7", *given]
    assert [line["status"] for line in lines] == [200, 200, 404]
    assert all(line["process"] == "api" and line["ms"] > 0 for line in lines)


async def test_polled_paths_are_logged_at_debug_only(
    client: EngineClient, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    for level in (logging.INFO, logging.DEBUG):
        caplog.clear()
        caplog.set_level(level, "hbserve.access")
        async with guarded(client, tokenizer) as server:
            for path in ("/health", "/ready", "/ping", "/metrics", "/stats", "/v1/semi_pd/status", "/v1/models"):
                await server.http.get(path)
        paths = [record.getMessage().split()[1] for record in caplog.records if record.name == "hbserve.access"]
        assert paths[-1] == "/v1/models"
        assert len(paths) == (1 if level == logging.INFO else 7)


async def test_limits_of_a_key(client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler) -> None:
    keys, gate = Keys({ANN: "ann", BOB: "bob"}, None), FairGate(max_per_key=2, rate_per_minute=4)
    async with guarded(client, tokenizer, keys, gate) as server:
        go_on = held(scheduler)
        open_requests = [
            asyncio.create_task(server.http.post("/v1/completions", json=BODY, headers=bearer(ANN))) for _ in range(2)
        ]
        await scheduler.wait_for(lambda: len(scheduler.requests) == 2)
        refused = await server.http.post("/v1/completions", json=BODY, headers=bearer(ANN))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert int(refused.headers["Retry-After"]) >= 1
        go_on.set()
        assert (await server.http.post("/v1/completions", json=BODY, headers=bearer(BOB))).status_code == 200
        assert [answer.status_code for answer in await asyncio.gather(*open_requests)] == [200, 200]
        statuses = [
            (await server.http.post("/v1/completions", json=BODY, headers=bearer(ANN))).status_code for _ in range(3)
        ]
        assert statuses == [200, 200, 429]


async def test_keys_take_turns() -> None:
    gate = FairGate(max_open=2, max_waiting=30)
    entered: list[str] = []

    async def request(key: str) -> None:
        await gate.enter(key)
        entered.append(key)
        await asyncio.sleep(0)
        gate.leave(key)

    await gate.enter("early")
    await gate.enter("early")
    greedy = [asyncio.create_task(request("greedy")) for _ in range(20)]
    await asyncio.sleep(0)
    modest = [asyncio.create_task(request(key)) for key in ("modest", "shy", "modest")]
    await asyncio.sleep(0)
    assert gate.num_waiting == 23
    leaver = asyncio.create_task(request("leaver"))
    await asyncio.sleep(0)
    leaver.cancel()
    gate.leave("early")
    gate.leave("early")
    await asyncio.wait_for(asyncio.gather(*greedy, *modest), DEADLINE_S)
    assert set(entered[:4]) == {"greedy", "modest", "shy"}
    assert entered.index("shy") < 4
    assert "leaver" not in entered
    assert gate.num_waiting == 0
    limited = FairGate(max_per_key=1)
    await limited.enter("a")
    with pytest.raises(RateLimitedError):
        await limited.enter("a")


async def test_a_client_that_disconnects_leaves_the_queue(
    client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler
) -> None:
    async with guarded(client, tokenizer, gate=FairGate(max_open=1)) as server:
        go_on = held(scheduler)
        first = asyncio.create_task(server.http.post("/v1/completions", json=BODY))
        await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
        others = [asyncio.create_task(server.http.post("/v1/completions", json=BODY)) for _ in range(3)]
        await until(lambda: server.gate.num_waiting == 3)
        others[0].cancel()
        await until(lambda: server.gate.num_waiting == 2)
        go_on.set()
        answers = await asyncio.gather(first, *others[1:])
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len(scheduler.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_at_the_end_requests_finish_or_fail_with_shutting_down(
    client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler, stream: bool
) -> None:
    async with guarded(client, tokenizer, drain_timeout_s=0.5) as server:
        go_on = held(scheduler)
        body = BODY | {"stream": stream}
        finishing = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
        server.stop.set()
        go_on.set()
        answer = await finishing
        assert answer.status_code == 200
        assert not stream or answer.text.endswith("[DONE]\n\n")
        await asyncio.wait_for(server.ended, DEADLINE_S)
    async with guarded(client, tokenizer, drain_timeout_s=0.5) as server:
        held(scheduler)
        handed_back = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await scheduler.wait_for(lambda: len(scheduler.requests) == 2)
        server.stop.set()
        answer = await handed_back
        assert answer.status_code == (200 if stream else 503)
        assert '"code":"shutting_down"' in answer.text
        assert "[DONE]" not in answer.text
        await scheduler.wait_for_aborts(1)


async def test_tls(client: EngineClient, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    async with guarded(client, tokenizer, tls=(str(cert), str(key))) as server:
        answer = await server.http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.url.scheme) == (200, "https")


PAGE = "https://page.example"


async def test_web_pages_of_allowed_origins_may_read_every_answer(
    client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler
) -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    keys = Keys({ANN: "ann"}, ADMIN)
    async with guarded(client, tokenizer, keys, cors_origins=(PAGE, "http://localhost:3000")) as server:
        http = server.http
        for path in ("/v1/chat/completions", "/v1/models", "/admin/drain"):
            answer = await http.options(path, headers={"Origin": PAGE, **preflight})
            assert answer.status_code == 200, answer.text
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
            assert "authorization" in answer.headers["Access-Control-Allow-Headers"]
        other = await http.options("/v1/models", headers={"Origin": "https://evil.example", **preflight})
        assert "Access-Control-Allow-Origin" not in other.headers
        for headers, body, status in (
            (bearer(ANN), BODY, 200),
            (bearer(ANN), BODY | {"stream": True}, 200),
            (bearer(ANN), BODY | {"temprature": 1}, 400),
            (bearer(ANN), BODY | {"model": "other"}, 404),
            ({}, BODY, 401),
            (bearer(ANN), None, 400),
        ):
            answer = await http.post("/v1/completions", json=body, headers={"Origin": PAGE, **headers})
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE
            assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        answer = await http.post(
            "/v1/completions", json=BODY, headers={"Origin": "https://evil.example", **bearer(ANN)}
        )
        assert "Access-Control-Allow-Origin" not in answer.headers
    async with guarded(client, tokenizer, cors_origins=("*",)) as server:
        answer = await server.http.get("/v1/models", headers={"Origin": "null"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
    async with guarded(client, tokenizer) as server:
        assert (await server.http.options("/v1/models", headers={"Origin": PAGE, **preflight})).status_code == 405
        answer = await server.http.get("/v1/models", headers={"Origin": PAGE})
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_origins_are_checked_in_the_configuration() -> None:
    document: dict[str, Any] = {
        "mode": "unified",
        "model": {"path": "."},
        "gpu_instances": [{"instance_id": "u", "instance_type": "unified"}],
    }
    for origin in ("https://page.example/", "page.example", "https://", "https://a b"):
        with pytest.raises(ConfigError, match=r"server\.cors_origins"):
            from_dict(document | {"server": {"cors_origins": [origin]}})


async def test_bodies_that_stall_or_drip_end_with_408_and_others_are_served(
    client: EngineClient, tokenizer: Tokenizer, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has no byte after its first; the other gets a byte again and again."""
    monkeypatch.setattr(received_body, "PART_TIMEOUT_S", 0.4)
    monkeypatch.setattr(received_body, "TIMEOUT_S", 0.8)

    async def slow(port: int, drips: bool) -> tuple[bytes, str]:
        reader, writer = await asyncio.open_connection("localhost", port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
        )
        writer.write(head.encode() + b"{")
        head_of_answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        while drips and not head_of_answer.done():
            writer.write(b" ")
            await asyncio.wait({head_of_answer}, timeout=0.05)
        lines = (await head_of_answer).lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        body = json.loads(await reader.readexactly(length))
        writer.close()
        return lines[0], body["error"]["message"]

    async with guarded(client, tokenizer, gate=FairGate(max_open=1)) as server, asyncio.timeout(DEADLINE_S):
        port = server.http.base_url.port
        assert port is not None
        attacks = [asyncio.create_task(slow(port, drips)) for drips in (False, True)]
        num_served = 0
        while not all(attack.done() for attack in attacks):
            assert (await server.http.post("/v1/completions", json=BODY)).status_code == 200
            num_served += 1
        assert num_served > 2
        assert await attacks[0] == (b"http/1.1 408 request timeout", "no part of the body arrived within 0.4 s")
        assert await attacks[1] == (b"http/1.1 408 request timeout", "the body did not arrive within 0.8 s")

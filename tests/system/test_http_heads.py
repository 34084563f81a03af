"""Heads of requests, byte by byte: what is no HTTP, what is too long, and offers of other protocols."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from hbserve.server import http_protocol
from tests.support.http_server import MODEL, until
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, tokens

BODY = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 3}).encode()
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
"""What Java's HttpClient sends with its first request, whether the server speaks HTTP/2 or not."""


def post(fields: bytes = b"", body: bytes = BODY) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield reader, writer
    writer.close()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length"))
        return int(head.split()[1]), json.loads(await reader.readexactly(int(length)))


@pytest.mark.parametrize("pieces", [1, 3, 1000])
async def test_an_offer_of_another_protocol_has_no_effect(
    connection: Connection, scheduler: ScriptedScheduler, pieces: int
) -> None:
    scheduler.script = tokens(70, 71, 72)
    reader, writer = connection
    chunked = post(UPGRADE + b"Transfer-Encoding: chunked\r\n").replace(b"Content-Length: %d\r\n" % len(BODY), b"")
    chunked = chunked.replace(BODY, b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n"
    sent = post(UPGRADE) + health + chunked + post() + health + health
    size = -(-len(sent) // pieces)
    for start in range(0, len(sent), size):
        writer.write(sent[start : start + size])
        await writer.drain()
        await asyncio.sleep(0)
    for kind in (post, health, post, post, health, health):
        status, body = await answer(reader)
        assert (status, "usage" in body) == (200, kind is post), body
        assert kind is not post or body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET /health HTTP/1.1\r\nX-Long: ", b"a" * 1000),
        (b"GET /health HTTP/1.1\r\n", b"X-Many: b\r\n" * 100),
        (b"GET /health?", b"a" * 1000),
        (
            post(b"Transfer-Encoding: chunked\r\n", b"").replace(b"Content-Length: 0\r\n", b"") + b"0\r\n",
            b"T: b\r\n" * 100,
        ),
        (post(b"Transfer-Encoding: chunked\r\n", b"").replace(b"Content-Length: 0\r\n", b"") + b"5;", b"a" * 1000),
    ],
    ids=["value", "headers", "url", "trailers", "chunk extension"],
)
async def test_a_head_without_end_is_refused(connection: Connection, begin: bytes, part: bytes) -> None:
    reader, writer = connection
    writer.write(begin)
    async with asyncio.timeout(DEADLINE_S):
        with suppress(ConnectionError):
            while True:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
    with suppress(ConnectionError):  # the rest of what was sent may overtake the answer
        status, body = await answer(reader)
        assert (status, str(http_protocol.MAX_HEAD_BYTES) in body["error"]["message"]) == (431, True)


async def test_a_head_that_is_a_little_too_long_is_refused_and_a_shorter_one_taken(http: httpx.AsyncClient) -> None:
    long = http_protocol.MAX_HEAD_BYTES
    assert (await http.get("/health", headers={"X-Long": "a" * (long - 2000)})).status_code == 200
    refused = await http.get("/health", headers={"X-Long": "a" * long})
    assert refused.status_code == 431
    assert str(long) in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", "method"),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", "url"),
        (post(b"Transfer-Encoding: chunked\r\n"), "Transfer-Encoding"),
        (post(b"Content-Length: 7\r\n"), "Content-Length"),
        (b"GET /health HTTP/1.1\r\nHost x\r\n\r\n", "header"),
    ],
)
async def test_the_answer_to_what_is_no_http_says_what_is_wrong(
    connection: Connection, sent: bytes, reason: str
) -> None:
    reader, writer = connection
    writer.write(sent)
    status, body = await answer(reader)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert reason in body["error"]["message"]
    assert not await reader.read()


async def test_trailers_are_ignored(connection: Connection, scheduler: ScriptedScheduler) -> None:
    scheduler.script = tokens(70)
    reader, writer = connection
    head = post(b"Transfer-Encoding: chunked\r\n", b"").replace(b"Content-Length: 0\r\n", b"")
    writer.write(head + b"%x\r\n%s\r\n0\r\nX-Request-Id: late\r\n\r\n" % (len(BODY), BODY))
    assert (await answer(reader))[0] == 200


async def test_an_encoded_body_is_refused_by_the_name_of_its_encoding(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused = await http.post("/v1/completions", content=gzip.compress(BODY), headers=headers)
    assert (refused.status_code, "'gzip'" in refused.json()["error"]["message"]) == (415, True)
    headers["Content-Encoding"] = "identity"
    assert (await http.post("/tokenize", json={"prompt": "x"}, headers=headers)).status_code == 200


@pytest.mark.parametrize("rest", ["an empty line", "a part of a refused body"])
async def test_bytes_of_no_request_do_not_keep_a_connection(
    connection: Connection, rest: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hbserve.server.http_protocol")
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    reader, writer = connection
    if rest == "an empty line":
        request, status, part = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 200, b"\r\n"
    else:
        request, status, part = (
            post(b"Content-Encoding: gzip\r\n", b"{").replace(b": 1\r", b": 99999999999\r"),
            415,
            b"a",
        )
    writer.write(request)
    assert (await answer(reader))[0] == status
    writer.write(part)
    with suppress(ConnectionError):
        assert not await asyncio.wait_for(reader.read(), DEADLINE_S)
    await until(lambda: any("cut off a client" in record.message for record in caplog.records))

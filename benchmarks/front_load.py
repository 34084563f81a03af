"""Many HTTP clients in one process at little cost: raw sockets, and no parsing beyond the counts."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

_COUNT = re.compile(rb'"completion_tokens":(\d+)')


@dataclass
class Answer:
    """Answer to one request.

    Attributes:
        ttft_s: from the sent request to the first event.
        num_chunks: events with text or a role.
        num_tokens: the server's count, else the number of chunks.
        complete: the stream ended with ``[DONE]``.
    """

    ttft_s: float = 0.0
    seconds: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0
    complete: bool = False


@dataclass
class _Connection(asyncio.Protocol):
    request: bytes
    answer: Answer = field(default_factory=Answer)

    def __post_init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._began = time.monotonic()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if not answer.ttft_s and b"data: " in data:
            answer.ttft_s = time.monotonic() - self._began
        answer.num_chunks += data.count(b"data: {")
        self._tail = (self._tail + data)[-400:]
        if b"data: [DONE]" in self._tail:
            counts = _COUNT.findall(self._tail)
            answer.num_tokens = int(counts[-1]) if counts else answer.num_chunks - 1  # without the chunk of the end
            answer.complete = True
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.answer.seconds = time.monotonic() - self._began
        if not self.done.done():
            self.done.set_result(None)


def completion(host: str, port: int, model: str, prompt: str, max_tokens: int) -> bytes:
    """Encode a streamed completion request."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def send(host: str, port: int, request: bytes) -> Answer:
    """Send one request on a connection of its own, and read its answer to the end."""
    _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(request), host, port)
    await connection.done
    return connection.answer


async def send_all(host: str, port: int, requests: list[bytes], concurrency: int) -> list[Answer]:
    """Send requests, ``concurrency`` at a time."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def client() -> None:
        for request in waiting:
            answers.append(await send(host, port, request))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers

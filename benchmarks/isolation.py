"""``python -m benchmarks isolation``: what one client's request does to the streams of others.

A well-behaved client streams from the front over an engine that costs nothing, one token per step. Beside it one attack
after the other runs: large, slow or malformed requests. The table has each attack's answer, the time that it took, and
the worst gap between two chunks of the other client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.front import HOST, front
from hbserve.bench.arguments import check_new_file
from hbserve.process import event_loop

Send = Callable[[str, bytes], Awaitable[str]]
"""Sends a body to a path, and returns the status of the answer."""
Attack = Callable[[Send], Awaitable[str]]
"""Sends what it has, and returns the statuses of the answers."""

STEP_S = 0.01
NUM_TOKENS = 100
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% if enable_thinking == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif enable_thinking %}{{ enable_thinking | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)
_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_USER = {"role": "user", "content": "hi"}


def attacks(scale: float = 1.0) -> dict[str, Callable[[], Attack]]:
    """Return functions that make the attacks, by name; ``scale`` makes them smaller."""
    mb, million = int(scale * 1e6), int(scale * 1e6)
    text, words = "/v1/completions", "one two three " * (30 * mb // 14)

    def prompt(**more: Any) -> bytes:
        return json.dumps({"model": "bench", "prompt": "x", "max_tokens": 2} | more).encode()

    def chat(**more: Any) -> bytes:
        return json.dumps({"model": "bench", "messages": [_USER], "max_tokens": 2} | more).encode()

    def tool(**more: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}} | more}

    def call(arguments: str) -> dict[str, Any]:
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    lists = json.dumps({"a": [[]] * (5 * million)})
    bodies: dict[str, tuple[str, Callable[[], bytes]]] = {
        "a prompt of 30 MB": (text, lambda: prompt(prompt=words)),
        "a prompt of 900 kB": (text, lambda: prompt(prompt=words[:900_000])),
        "a prompt of one letter, 900,000 times": (text, lambda: prompt(prompt="a" * 900_000)),
        "a prompt of 30 MB, in escapes": (text, lambda: prompt(prompt="\u4f60" * (5 * million))),
        "a prompt of 30 MB of commas": (text, lambda: prompt(prompt="," * (30 * mb))),
        "6 million token ids": (text, lambda: prompt(prompt=[5] * (6 * million))),
        "100,000 token ids": (text, lambda: prompt(prompt=[5] * 100_000)),
        "3 million strings in place of token ids": (text, lambda: prompt(prompt=["a"] * (3 * million))),
        "4000 prompts": (text, lambda: prompt(prompt=[[5]] * 4000, max_tokens=1)),
        "a million unknown parameters": (text, lambda: prompt(**{f"key{i}": i + 1 for i in range(million)})),
        "16,000 unknown parameters": (text, lambda: prompt(**{f"k{i}": 1 for i in range(8000)})),
        "a million biases": (text, lambda: prompt(logit_bias={str(i): 1 for i in range(million)})),
        "100,000 levels of brackets": (text, lambda: b'{"model": "bench", "prompt": ' + b"[" * 100_000),
        "5 million lists": (text, lambda: prompt(prompt=[[]] * (5 * million))),
        "no JSON": (text, lambda: b'{"a": ' + b"1" * (5 * mb)),
        "30 MB of content": ("/v1/chat/completions", lambda: chat(messages=[_USER | {"content": words}])),
        "a million unknown fields of a message": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER | {f"key{i}": i for i in range(million)}]),
        ),
        "5000 messages": ("/v1/chat/completions", lambda: chat(messages=[_USER] * 5000)),
        "300,000 messages that are none": ("/v1/chat/completions", lambda: chat(messages=[1] * 300_000)),
        "a tool of 25 MB": (
            "/v1/chat/completions",
            lambda: chat(tools=[tool(description=words[: 25 * mb])]),
        ),
        "100,000 tools": ("/v1/chat/completions", lambda: chat(tools=[tool()] * int(100_000 * scale))),
        "a tool with a schema of a million values": (
            "/v1/chat/completions",
            lambda: chat(tools=[tool(parameters={"enum": list(range(million))})]),
        ),
        "arguments of 25 MB": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER, call(json.dumps({"a": words[: 25 * mb]})), _USER]),
        ),
        "arguments of 5 million lists": ("/v1/chat/completions", lambda: chat(messages=[_USER, call(lists), _USER])),
        "template variables of 25 MB": (
            "/v1/chat/completions",
            lambda: chat(chat_template_kwargs={"enable_thinking": words[: 25 * mb]}),
        ),
        "a chat template that loops": (
            "/v1/chat/completions",
            lambda: chat(chat_template_kwargs={"enable_thinking": "loop"}),
        ),
        "a template of the request that loops": ("/v1/chat/completions", lambda: chat(chat_template=_LOOP)),
        "900 kB to /tokenize": ("/tokenize", lambda: json.dumps({"prompt": words[:900_000]}).encode()),
        "6 million ids to /detokenize": ("/detokenize", lambda: json.dumps({"tokens": [5] * (6 * million)}).encode()),
        "100,000 ids to /detokenize": ("/detokenize", lambda: json.dumps({"tokens": [305] * 100_000}).encode()),
        "32 MB of random bytes": (text, lambda: bytes(range(256)) * (mb // 8)),
        "40 MB": (text, lambda: b" " * (40 * 2**20)),
    }

    def of(path: str, make: Callable[[], bytes]) -> Attack:
        async def run(send: Send) -> str:
            return await send(path, body)

        body = make()  # before the other client's streams, which the same event loop reads
        return run

    async def twice(send: Send) -> str:
        body = chat(chat_template_kwargs={"enable_thinking": "loop"})
        found = await asyncio.gather(*(send("/v1/chat/completions", body) for _ in range(2)))
        return " ".join(sorted(set(found)))

    made: dict[str, Callable[[], Attack]] = {name: partial(of, *body) for name, body in bodies.items()}
    return made | {"two templates that loop, at once": lambda: twice}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="examples/models/hbserve-demo", help="folder whose tokenizer is used")
    parser.add_argument("--num-tokenizers", type=int, default=0, help="server.num_tokenizers")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the attacks")
    parser.add_argument("--only", help="part of the names of the attacks to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each line as soon as it is known, and return all."""
    check_new_file("--json", arguments.json)
    chosen = {name: one for name, one in attacks(arguments.scale).items() if (arguments.only or "") in name}
    found: dict[str, Any] = {}
    print(f"{'attack':44} {'status':>8} {'seconds':>8} {'worst gap, ms':>14}", flush=True)
    with model_with_template(arguments.model) as folder, front(folder, STEP_S, arguments.num_tokenizers) as (port, _):
        expected, _ = event_loop.run(stream(port))
        for name, make in {"none": lambda: _nothing, **chosen}.items():
            status, seconds, gap_s = event_loop.run(disturb(port, make(), expected))
            found[name] = {"status": status, "seconds": round(seconds, 2), "worst_gap_ms": round(gap_s * 1000)}
            print(f"{name:44} {status:>8} {seconds:8.2f} {gap_s * 1000:14.0f}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


async def _nothing(send: Send) -> str:
    await asyncio.sleep(2)
    return "-"


@contextmanager
def model_with_template(model: str) -> Iterator[str]:
    """Copy a model folder without its weights, and give it `TEMPLATE`."""
    with tempfile.TemporaryDirectory(prefix="hbserve-") as folder:
        for file in Path(model).iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".jinja"):
                shutil.copy(file, folder)
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(config | {"chat_template": TEMPLATE}))
        yield folder


async def disturb(port: int, attack: Attack, expected: str) -> tuple[str, float, float]:
    """Run an attack beside a client that streams ``expected``, again and again.

    Returns:
        The attack's answer, its duration, and the longest time between two chunks of the other client.

    Raises:
        AssertionError: if a stream of the other client does not end with the right text.
    """
    is_streaming = asyncio.Event()
    began = time.monotonic()
    attacking = asyncio.create_task(_attack(port, attack, is_streaming))
    worst_s = 0.0
    while not attacking.done():
        text, gap_s = await stream(port, is_streaming.set)
        assert text == expected, f"the other client's text is {text!r}, not {expected!r}"
        worst_s = max(worst_s, gap_s)
    status, ended = attacking.result()
    return status, ended - began, worst_s


async def stream(port: int, on_token: Callable[[], object] = lambda: None) -> tuple[str, float]:
    """Stream a completion; return its text and the longest time between two chunks."""
    reader, writer = await asyncio.open_connection(HOST, port)
    body = {"model": "bench", "prompt": "x", "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}
    writer.write(_post("/v1/completions", json.dumps(body).encode()))
    text, worst_s, last = "", 0.0, 0.0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        worst_s, last = max(worst_s, now - last) if last else 0.0, now
        text += json.loads(line[6:])["choices"][0]["text"]
        on_token()
    writer.close()
    return text, worst_s


async def _attack(port: int, attack: Attack, is_streaming: asyncio.Event) -> tuple[str, float]:
    await is_streaming.wait()

    async def send(path: str, body: bytes) -> str:
        reader, writer = await asyncio.open_connection(HOST, port)
        request = memoryview(_post(path, body))
        try:
            for start in range(0, len(request), 1 << 17):
                writer.write(request[start : start + (1 << 17)])
                await writer.drain()
        except ConnectionError:
            pass  # it was refused before its end
        try:
            status = (await reader.readline()).split(b" ")[1].decode()
            while await reader.read(1 << 16):
                pass
        except (ConnectionError, IndexError):
            status = "closed"
        writer.close()
        return status

    status = await attack(send)
    return status, time.monotonic()


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

"""The attacks of ``python -m benchmarks isolation``: large, slow and malformed requests of one client.

Many are far beyond the server's limits. Others stay just within them, because that is what costs the server most.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

Send = Callable[[str, bytes], Awaitable[str]]
"""Sends a body to a path, and returns the status of the answer."""
Attack = Callable[[Send], Awaitable[str]]
"""Sends what it has, and returns the statuses of the answers."""

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

    def wide(number: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(number)}}

    def schema(value: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}

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
        "4000 streamed prompts, usage in each chunk": (
            text,
            lambda: prompt(
                prompt=[[5]] * 4000,
                max_tokens=1,
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
            ),
        ),
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
        "131,000 token ids": (text, lambda: prompt(prompt=[5] * int(131_000 * scale))),
        "a prompt of 3.9 MB, in small letters": (text, lambda: prompt(prompt="ab " * int(1.3 * mb))),
        "8000 prompts of one letter": (text, lambda: prompt(prompt=["a"] * 8000)),
        "30 prompts with 128 samples each": (text, lambda: prompt(prompt=["a"] * 30, n=128)),
        "128 samples of 3900 token ids": (text, lambda: prompt(prompt=[5] * 3900, n=128)),
        "an echo of 3900 token ids, 128 times": (text, lambda: prompt(prompt=[305] * 3900, n=128, echo=True)),
        "16,000 biases": (text, lambda: prompt(logit_bias={str(i): 1 for i in range(16_000)})),
        "16,000 stop strings": (text, lambda: prompt(stop=[f"s{i}" for i in range(16_000)])),
        "16,000 bad words": (text, lambda: prompt(bad_words=[f"s{i}" for i in range(16_000)])),
        "16,000 allowed token ids": (text, lambda: prompt(allowed_token_ids=[5] * 16_000)),
        "a grammar of 190 kB": (text, lambda: prompt(grammar="start: " + " | ".join(['"abc"'] * 21_000))),
        "a grammar of 190 kB that is none": (text, lambda: prompt(grammar="start: " + "( " * 95_000)),
        "metadata of 65,000 values": (text, lambda: prompt(metadata=[1] * int(65_000 * scale))),
        "4000 messages": ("/v1/chat/completions", lambda: chat(messages=[_USER] * 4000)),
        "one message of 5000 parts": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER | {"content": [{"type": "text", "text": "a"}] * 5000}]),
        ),
        "16,000 unknown fields of a message": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER | {f"key{i}": i for i in range(16_000)}]),
        ),
        "2000 tools": ("/v1/chat/completions", lambda: chat(tools=[tool()] * 2000)),
        "2000 tools, one to be called": (
            "/v1/chat/completions",
            lambda: chat(tools=[tool(name=f"f{i}") for i in range(2000)], tool_choice="required"),
        ),
        "a tool with a schema of 65,000 values": (
            "/v1/chat/completions",
            lambda: chat(tools=[tool(parameters={"type": "object", "enum": list(range(int(65_000 * scale)))})]),
        ),
        "a tool to be called, with 32,000 properties": (
            "/v1/chat/completions",
            lambda: chat(tools=[tool(parameters=wide(int(32_000 * scale)))], tool_choice="required"),
        ),
        "an answer's schema of 32,000 properties": (
            "/v1/chat/completions",
            lambda: chat(response_format=schema(wide(int(32_000 * scale)))),
        ),
        "an answer's schema of 2000 properties": (
            "/v1/chat/completions",
            lambda: chat(response_format=schema(wide(2000))),
        ),
        "an answer's schema with a costly pattern": (
            "/v1/chat/completions",
            lambda: chat(response_format=schema({"type": "string", "pattern": "^(((a{1,50}){1,50}){1,50}){1,50}$"})),
        ),
        "arguments of 130,000 lists": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER, call(json.dumps({"a": [[]] * int(130_000 * scale)})), _USER]),
        ),
        "template variables of 65,000 values": (
            "/v1/chat/completions",
            lambda: chat(chat_template_kwargs={"enable_thinking": list(range(int(65_000 * scale)))}),
        ),
        "a chat of a million letters": (
            "/v1/chat/completions",
            lambda: chat(messages=[_USER | {"content": words[: int(0.99 * mb)]}]),
        ),
        "a response to 5000 items": (
            "/v1/responses",
            lambda: json.dumps({"model": "bench", "input": [_USER] * 5000, "max_output_tokens": 2}).encode(),
        ),
        "a response to a text of 30 MB": (
            "/v1/responses",
            lambda: json.dumps({"model": "bench", "input": words}).encode(),
        ),
        "131,000 ids to /detokenize": (
            "/detokenize",
            lambda: json.dumps({"tokens": [305] * int(131_000 * scale)}).encode(),
        ),
        "130,000 tokens to /tokenize": ("/tokenize", lambda: json.dumps({"prompt": "a b " * (mb // 16)}).encode()),
        "a million letters to /tokenize": ("/tokenize", lambda: json.dumps({"prompt": "a b " * (mb // 4)}).encode()),
    }

    def of(path: str, make: Callable[[], bytes]) -> Attack:
        async def run(send: Send) -> str:
            return await send(path, body)

        body = make()  # before the other client's streams, which the same event loop reads
        return run

    def at_once(number: int, path: str, make: Callable[[], bytes]) -> Attack:
        async def run(send: Send) -> str:
            found = await asyncio.gather(*(send(path, body) for _ in range(number)))
            return " ".join(sorted(set(found)))

        body = make()
        return run

    made: dict[str, Callable[[], Attack]] = {name: partial(of, *body) for name, body in bodies.items()}
    together = {
        2: "a chat template that loops",
        10: "131,000 token ids",
        20: "16,000 unknown parameters",
        21: "5000 messages",
        5: "a tool with a schema of 65,000 values",
        4: "a prompt of 30 MB",
        8: "4000 prompts",
    }
    return made | {
        f"{number} at once: {name}": partial(at_once, number, *bodies[name]) for number, name in together.items()
    }

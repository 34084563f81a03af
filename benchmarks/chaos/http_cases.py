"""HTTP requests with something broken: a value, a key, the JSON text, a header, the framing, the method or the path."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from benchmarks.chaos.mutations import NAMES, mutate, mutate_bytes
from benchmarks.chaos.service import ADMIN_KEY, MODEL

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "one two"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "user", "content": "three"},
]
_SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "stop": ["zq", "qz"],
    "stop_token_ids": [5],
    "min_tokens": 1,
    "logit_bias": {"7": 1.5},
    "bad_words": ["dog"],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "ttft_ms": 1000,
    "tpot_ms": 1000,
    "user": "me",
}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}


class Valid(NamedTuple):
    """A valid request, which cases break."""

    method: str
    path: str
    body: Any = None
    is_admin: bool = False


def valid_requests() -> list[Valid]:
    """Return at least one request for each endpoint, and several for those that take much."""
    completion, chat, response = "/v1/completions", "/v1/chat/completions", "/v1/responses"
    few = {"model": MODEL, "max_tokens": 4}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA, "strict": True}}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one two"}]}
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
    posts = [
        Valid("POST", completion, {**few, "prompt": "the cat"}),
        Valid("POST", completion, {**few, **_SAMPLING, **stream, "prompt": "the cat sat"}),
        Valid("POST", completion, {**few, "prompt": ["the cat", "the dog"], "n": 2, "logprobs": 2, "echo": True}),
        Valid("POST", completion, {**few, "prompt": [[5, 6, 7], [8]], "prompt_logprobs": 1, "return_token_ids": True}),
        Valid("POST", completion, {**few, "prompt": "x", "structured_outputs": {"regex": "[ab]{1,3}"}}),
        Valid("POST", completion, {**few, "prompt": "x", "grammar": 'start: "a" | "b"'}),
        Valid("POST", completion, {**few, "prompt": "x", "allowed_token_ids": [4, 5, 6], "truncate_prompt_tokens": 3}),
        Valid("POST", chat, {**few, "messages": _CHAT, "tools": [_TOOL]}),
        Valid("POST", chat, {**few, **_SAMPLING, **stream, "messages": _CHAT}),
        Valid("POST", chat, {**few, "messages": _CHAT[:2], "response_format": form, **stream}),
        Valid("POST", chat, {**few, "messages": _CHAT[-1:], "tools": [_TOOL], "tool_choice": "required"}),
        Valid("POST", chat, {**few, "messages": _CHAT[-1:], "logprobs": True, "top_logprobs": 2}),
        Valid("POST", chat, {**few, "messages": _CHAT[-1:], "chat_template_kwargs": {"enable_thinking": False}}),
        Valid("POST", response, {"model": MODEL, "input": "the cat", "max_output_tokens": 4, "instructions": "short"}),
        Valid("POST", response, {"input": [item], "max_output_tokens": 4, "tools": [tool], "stream": True}),
        Valid("POST", response, {"input": "x", "max_output_tokens": 4, "text": {"format": {"type": "json_object"}}}),
        Valid("POST", "/tokenize", {"model": MODEL, "prompt": "the cat", "add_special_tokens": True}),
        Valid("POST", "/tokenize", {"messages": _CHAT, "tools": [_TOOL], "add_generation_prompt": True}),
        Valid("POST", "/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
        Valid("POST", "/v1/instances/unified-0/role", {"role": "prefill", "timeout_s": 5}, is_admin=True),
        Valid("POST", "/v1/semi_pd/allocation", {"prefill_percentage": 60, "decode_percentage": 100}, is_admin=True),
        Valid("POST", "/ping", {}),
        Valid("POST", "/admin/drain", {}),  # without the key
    ]
    gets = [
        *("/", "/live", "/health", "/ready", "/ping", "/stats", "/metrics", "/version", "/v1/models", "/openapi.json"),
        *(f"/v1/models/{MODEL}", "/tokenizer_info", "/v1/semi_pd/status", "/v1/responses/resp_1", "/page/app.js"),
        "/v1/responses/resp_1/input_items?limit=2&order=asc",
    ]
    deletes = [
        Valid("DELETE", "/v1/responses/resp_1"),
        Valid("DELETE", "/v1/instances/none?timeout_s=3", is_admin=True),
    ]
    return [*posts, *posts, *(Valid("GET", path) for path in gets), *deletes]


class Case(NamedTuple):
    """The bytes of a request.

    Attributes:
        is_whole: whether the client still expects an answer when all is sent; else it closes its sending side at once.
    """

    what: str
    data: bytes
    is_whole: bool = True


def make_case(chance: random.Random) -> Case:
    """Break a valid request in one to three places."""
    valid = chance.choice(valid_requests())
    method, path, body = valid.method.encode(), valid.path.encode(), valid.body
    changes = []
    if body is not None and chance.random() < 0.7:
        for _ in range(chance.choice([1, 1, 2, 3])):
            body, change = mutate(body, chance)
            changes.append(change)
    content = (
        b"" if body is None else json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    )
    if body is not None and (not changes or chance.random() < 0.1):
        content, change = mutate_bytes(content, chance)
        changes.append(change)
    headers = [(b"Host", b"x"), (b"Content-Type", b"application/json"), (b"Connection", b"close")]
    if valid.is_admin:
        headers.append((b"Authorization", b"Bearer " + ADMIN_KEY.encode()))
    if chance.random() < 0.25 or not changes:
        method, path, headers, change = _break_head(method, path, headers, chance)
        changes.append(change)
    framed, is_whole, change = _frame(content, headers, chance)
    changes += [change] if change else []
    head = method + b" " + path + b" HTTP/1.1\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    data = head + framed
    if chance.random() < 0.03:
        data, change = mutate_bytes(data, chance)
        changes.append(f"of the request: {change}")
    return Case(f"{valid.method} {valid.path}: {', '.join(changes)}", data, is_whole)


def _break_head(
    method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], chance: random.Random
) -> tuple[bytes, bytes, list[tuple[bytes, bytes]], str]:
    odd = [b"", b"\x00", b"\xff\xfe", "é".encode(), b"a" * 20_000, b"%00", b"%ff", b"..", b"//", b"?" * 100, b"%", b"#"]
    match chance.choice(["method", "path", "query", "type", "header", "many", "one", "key", "id"]):
        case "method":
            methods = [b"GET", b"PUT", b"PATCH", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"DELETE", b"post", b"\x00"]
            method = chance.choice([*methods, b"PRI", b"M" * 5000])
            return method, path, headers, f"method {method!r:.20}"
        case "path":
            place, new = chance.randrange(len(path) + 1), chance.choice(odd)
            path = path[:place] + new + path[place + chance.randrange(2) :]
            return method, path, headers, f"path {path!r:.60}"
        case "query":
            queries = [b"?timeout_s=nan", b"?timeout_s=-1", b"?timeout_s=1e999", b"?limit=x", b"?a" * 3000, b"?%ff=%00"]
            path += chance.choice([*queries, b"?limit=-1", b"?after=\xff", b"?order=\xc3", b"?limit=" + b"9" * 5000])
            return method, path, headers, f"path {path!r:.60}"
        case "type":
            types = [b"", b"text/plain", b"application/json; charset=utf-16", b"multipart/form-data; boundary=x"]
            types += [
                b"application/x-www-form-urlencoded",
                b"application/json;" * 500,
                b"\xff",
                b"application/problem+json",
            ]
            headers = [(name, chance.choice(types) if name == b"Content-Type" else value) for name, value in headers]
            return method, path, headers, f"content type {headers[1][1]!r:.40}"
        case "header":
            names = [
                b"X-Request-Id",
                b"Accept",
                b"Accept-Encoding",
                b"Content-Encoding",
                b"Upgrade",
                b"Cookie",
                b"Range",
            ]
            names += [b"Expect", b"Origin", b"TE", b"X-Forwarded-For", b"If-None-Match", b"", b"\xff", b"a b", b"a:b"]
            values = [
                *odd,
                b"100-continue",
                b"gzip",
                b"websocket",
                b"h2c",
                b"bytes=0-1",
                b"a\x00b",
                b"\t",
                b"\r",
                b"a\nb",
            ]
            header = chance.choice(names), chance.choice(values)
            return method, path, [*headers, header], f"header {header[0]!r}: {header[1]!r:.30}"
        case "many":
            count = chance.choice([100, 2000])
            return method, path, [*headers, *((b"X-%d" % number, b"v") for number in range(count))], f"{count} headers"
        case "one":
            return method, path, [*headers, (b"X-Long", b"v" * 200_000)], "a header of 200 kB"
        case "key":
            keys = [b"Bearer", b"Bearer \xff", b"Basic YTpi", b"Bearer " + b"k" * 10_000, b"bearer  x", b"\x01"]
            header = chance.choice([b"Authorization", b"X-API-Key"]), chance.choice(keys)
            others = [other for other in headers if other[0] != header[0]]
            return method, path, [*others, header], f"key {header[1]!r:.30}"
        case _:
            name = chance.choice(NAMES).encode("utf-8", "surrogatepass")
            path = path.replace(b"resp_1", name).replace(b"unified-0", name).replace(MODEL.encode(), name)
            return method, path, headers, f"path {path!r:.60}"


def _frame(content: bytes, headers: list[tuple[bytes, bytes]], chance: random.Random) -> tuple[bytes, bool, str]:
    """Return what follows the other headers, whether the request is whole, and what is wrong with it."""
    length = b"Content-Length: %d\r\n" % len(content)
    chunked = b"Transfer-Encoding: chunked\r\n"
    half = len(content) // 2
    pieces = content[:half], content[half:]
    if chance.random() > 0.2:
        return length + b"\r\n" + content, True, ""
    way = chance.choice(
        [
            "short",
            "long",
            "none",
            "two",
            "both",
            "negative",
            "huge",
            "words",
            "chunks",
            "sizes",
            "endless",
            "cut",
            "trailers",
        ]
    )
    framed, is_whole = {
        "short": (b"Content-Length: %d\r\n\r\n" % half + content, True),
        "long": (b"Content-Length: %d\r\n\r\n" % (len(content) + 9) + content, False),
        "none": (b"\r\n" + content, True),
        "two": (length + b"Content-Length: 3\r\n\r\n" + content, True),
        "both": (length + chunked + b"\r\n" + _chunk(content) + b"0\r\n\r\n", True),
        "negative": (b"Content-Length: -1\r\n\r\n" + content, True),
        "huge": (b"Content-Length: 99999999999999999999999\r\n\r\n" + content, True),
        "words": (
            b"Content-Length: " + chance.choice([b"x", b"1e3", b"0x10", b"+5", b" "]) + b"\r\n\r\n" + content,
            True,
        ),
        "chunks": (chunked + b"\r\n" + b"".join(_chunk(bytes([byte])) for byte in content[:3000]) + b"0\r\n\r\n", True),
        "sizes": (
            chunked
            + b"\r\n"
            + chance.choice([b"zz", b"-1", b"fffffffffffffffff", b"5;" + b"x" * 9000, b""])
            + b"\r\n"
            + content,
            False,
        ),
        "endless": (chunked + b"\r\n" + b"".join(map(_chunk, pieces)), False),
        "cut": (length + b"\r\n" + pieces[0], False),
        "trailers": (chunked + b"\r\n" + _chunk(content) + b"0\r\nX-Late: \xff\r\nContent-Length: 1\r\n\r\n", True),
    }[way]
    return framed, is_whole, f"framing: {way}"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n" if data else b""

"""``python -m benchmarks front``: the cost of the front, with an engine that costs nothing.

It measures four things: streamed tokens per second over HTTP; requests of 500 prompt tokens per second;
the front's part of TTFT at low load; and whether many open streams stay open for a minute with flat memory.
With ``--url`` the same load goes to another server, whose engine should cost as little.

    this process (clients, `front_load`)  ──HTTP──►  `front_server`  ──ZeroMQ──►  `front_stub`
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks import front_load
from hbserve.bench.arguments import check_new_file, positive
from hbserve.errors import ConfigError
from hbserve.process import event_loop

PROMPT = "Remember the words that were said, and say them again one after the other. "
HOST = "127.0.0.1"
STEPS_OF_HOLD = 20
"""Tokens of each stream while all streams are open."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="examples/models/hbserve-demo", help="folder whose tokenizer is used")
    parser.add_argument("--num-tokenizers", type=int, default=0, help="server.num_tokenizers")
    parser.add_argument("--streams", type=positive, default=256, help="concurrent streams of the throughput run")
    parser.add_argument("--tokens", type=positive, default=400, help="tokens per stream of the throughput run")
    parser.add_argument("--step-ms", type=float, default=10.0, help="from one step of the engine stub to the next")
    parser.add_argument("--requests", type=positive, default=3000, help="requests of the request-rate run")
    parser.add_argument("--prompt-tokens", type=positive, default=500, help="their prompts' length")
    parser.add_argument("--open-streams", type=int, default=10_000, help="streams that stay open; 0: skip")
    parser.add_argument("--hold-s", type=float, default=60.0, help="seconds that they stay open")
    parser.add_argument("--url", help="a running server to load, http://host:port, in place of one that is started")
    parser.add_argument("--served-model", default="bench", help="its model's name, with --url")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each number as soon as it is known, and return all.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    if not (Path(arguments.model) / "config.json").is_file():
        raise ConfigError(f"--model: {arguments.model!r} is no model folder")
    if arguments.num_tokenizers < 0 or arguments.step_ms < 0 or arguments.open_streams < 0 or arguments.hold_s <= 0:
        raise ConfigError("--num-tokenizers, --step-ms and --open-streams must not be negative, --hold-s be positive")
    if arguments.url is not None and urlsplit(arguments.url).scheme != "http":
        raise ConfigError(f"--url must begin with http://, got {arguments.url!r}")
    check_new_file("--json", arguments.json)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    numbers: dict[str, Any] = {"cpus": os.cpu_count(), "options": {k: str(v) for k, v in vars(arguments).items()}}

    def note(found: dict[str, Any]) -> None:
        numbers.update(found)
        for name, value in found.items():
            print(f"{name:32} {value}", flush=True)

    print(f"{'cpus':32} {os.cpu_count()}", flush=True)
    if arguments.url is not None:
        address = urlsplit(arguments.url)
        _run_short(arguments, _Target(address.hostname or HOST, address.port or 80, arguments.served_model), note)
    else:
        with front(arguments.model, arguments.step_ms / 1000, arguments.num_tokenizers) as (port, pids):
            _run_short(arguments, _Target(HOST, port, "bench"), note)
            note({"rss_mb": _rss_mb(pids)})
        if arguments.open_streams:
            # Each stream has few tokens: the load is many connections, not much text.
            with front(arguments.model, arguments.hold_s / STEPS_OF_HOLD, arguments.num_tokenizers) as (port, pids):
                note(event_loop.run(_hold(arguments, _Target(HOST, port, "bench"), pids)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


class _Target(NamedTuple):
    """The server under load."""

    host: str
    port: int
    model: str

    def request(self, prompt: str, max_tokens: int) -> bytes:
        return front_load.completion(self.host, self.port, self.model, prompt, max_tokens)


def _run_short(arguments: argparse.Namespace, target: _Target, note: Callable[[dict[str, Any]], None]) -> None:
    note(event_loop.run(_throughput(arguments, target)))
    note(event_loop.run(_requests(arguments, target)))
    note(event_loop.run(_latency(arguments, target)))


async def _throughput(arguments: argparse.Namespace, target: _Target) -> dict[str, Any]:
    request = target.request("x", arguments.tokens)
    await front_load.send_all(target.host, target.port, [request] * 32, 32)
    began = time.monotonic()
    answers = await front_load.send_all(target.host, target.port, [request] * arguments.streams, arguments.streams)
    seconds = time.monotonic() - began
    assert all(answer.complete and answer.num_tokens == arguments.tokens for answer in answers), "a stream was lost"
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "streamed_tokens_per_s": round(num_tokens / seconds),
        "tokens_per_chunk": round(num_tokens / sum(answer.num_chunks for answer in answers), 2),
        "engine_tokens_per_s": round(arguments.streams * 1000 / arguments.step_ms) if arguments.step_ms else "no limit",
    }


async def _requests(arguments: argparse.Namespace, target: _Target) -> dict[str, Any]:
    # Prompts begin differently, so that each needs the tokenizer and no cache helps.
    prompt = _prompt_of(arguments.model, arguments.prompt_tokens)
    requests = [target.request(f"{number} {prompt}", 1) for number in range(arguments.requests)]
    began = time.monotonic()
    answers = await front_load.send_all(target.host, target.port, requests, 64)
    seconds = time.monotonic() - began
    assert all(answer.complete for answer in answers), "a request was lost"
    return {"requests_per_s": round(len(answers) / seconds)}


async def _latency(arguments: argparse.Namespace, target: _Target) -> dict[str, Any]:
    request = target.request(_prompt_of(arguments.model, arguments.prompt_tokens), 2)
    ttfts_ms = []
    for _ in range(max(2, min(200, arguments.requests))):
        answer = await front_load.send(target.host, target.port, request)
        ttfts_ms.append(answer.ttft_s * 1000)
        await asyncio.sleep(0.01)  # low load
    cuts = statistics.quantiles(ttfts_ms, n=100)
    return {"ttft_p50_ms": round(cuts[49], 2), "ttft_p95_ms": round(cuts[94], 2)}


async def _hold(arguments: argparse.Namespace, target: _Target, pids: dict[str, int]) -> dict[str, Any]:
    num_tokens = 2 * STEPS_OF_HOLD  # half of them while the other streams are being opened
    request = target.request("x", num_tokens)
    gate = asyncio.Semaphore(200)  # limit of connections being made; the listen queue is short
    rss: list[dict[str, int]] = []
    num_open = 0

    async def open_stream() -> front_load.Answer:
        nonlocal num_open
        async with gate:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                lambda: front_load._Connection(request), target.host, target.port
            )
        num_open += 1
        await connection.done
        num_open -= 1
        return connection.answer

    began = time.monotonic()
    tasks = [asyncio.create_task(open_stream()) for _ in range(arguments.open_streams)]
    max_open = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(1)
        max_open = max(max_open, num_open)
        if num_open == arguments.open_streams:
            rss.append(_rss_mb(pids))
    answers = [task.result() for task in tasks]
    lost = sum(not answer.complete or answer.num_tokens != num_tokens for answer in answers)
    return {
        "held_streams": max_open,
        "held_lost": lost,
        "held_s": round(time.monotonic() - began, 1),
        "held_all_s": len(rss),
        "held_rss_mb_first": rss[0] if rss else None,
        "held_rss_mb_middle": rss[len(rss) // 2] if rss else None,
        "held_rss_mb_last": rss[-1] if rss else None,
    }


@functools.cache
def _prompt_of(model: str, num_tokens: int) -> str:
    from hbserve.tokenizer import Tokenizer

    tokenizer = Tokenizer(model)
    ids = tokenizer.encode(PROMPT * num_tokens)[:num_tokens]
    return tokenizer.decode(ids)


@contextmanager
def front(
    model: str, step_s: float, num_tokenizers: int, max_num_seqs: int = 0, **server: Any
) -> Iterator[tuple[int, dict[str, int]]]:
    """Start engine stub and API server as processes; yield the port and the pids.

    Args:
        max_num_seqs: see `benchmarks.front_stub.EngineStub`.
        server: more of that section of the configuration.
    """
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    config = {
        "model": {"path": model, "served_name": "bench"},
        "server": {"port": 0, "num_tokenizers": num_tokenizers, **server},
        "logging": {"level": "WARNING"},
    }
    with tempfile.TemporaryDirectory(prefix="hbserve-") as folder:
        address = f"ipc://{folder}/stub"
        python = [sys.executable, "-m"]
        engine = [address, str(step_s), str(vocab_size), str(max_num_seqs)]
        stub = subprocess.Popen([*python, "benchmarks.front_stub", *engine])
        api = subprocess.Popen(
            [*python, "benchmarks.front_server", address, json.dumps(config)], stdout=subprocess.PIPE
        )
        try:
            assert api.stdout is not None
            line = api.stdout.readline()
            if not line:
                raise RuntimeError("the API server did not start; see above")
            ready = json.loads(line)
            yield ready["port"], {"api": api.pid, "stub": stub.pid, **ready["pids"]}
        finally:
            for process in (api, stub):
                process.terminate()
                process.wait(30)


def _rss_mb(pids: dict[str, int]) -> dict[str, int]:
    def of(pid: int) -> int:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() >> 20

    return {name: of(pid) for name, pid in pids.items()}

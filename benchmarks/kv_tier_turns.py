"""``python -m benchmarks kv_tier_turns``: sessions in turns on a small KV pool, without a host tier and with one.

The sessions' prompts together are several times as large as the pool. In each turn every session asks once, with all
that was said before. In the first turn everything is new: what does storing cost? Then: how much of each prompt is
cached, beside a cache that forgets nothing, and at which rate turns end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv_tier_random import BLOCK_SIZE, idle_stats
from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    make_config,
    positive,
    positive_float,
)
from hbserve.errors import HBServeError

_TURN_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--pool-tokens", type=positive, default=40_000, help="that the KV pool holds (default: 40000)")
    parser.add_argument("--host-bytes", type=positive, default=40 << 30, help="of the tier (default: 40 GiB)")
    parser.add_argument("--prompt-len", type=positive, default=8192, help="of a first turn (default: 8192)")
    parser.add_argument("--working-set", type=positive_float, default=5.0, help="multiple of the pool (default: 5)")
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--output-len", type=positive, default=32)
    parser.add_argument("--concurrency", type=positive, default=8, help="open requests (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    check_new_file("--json", arguments.json)
    found: dict[str, Any] = {}
    for name, host_bytes in (("none", 0), ("host", arguments.host_bytes)):
        print(f"{'with the tier' if host_bytes else 'no tier'}:", flush=True)
        found[name] = asyncio.run(_measure(arguments, host_bytes))
    for turn, (before, after) in enumerate(zip(found["none"]["turns"], found["host"]["turns"], strict=True), 1):
        print(f"turn {turn}: throughput with the tier is {before['seconds'] / after['seconds']:.2f} times")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


async def _measure(arguments: argparse.Namespace, host_bytes: int) -> dict[str, Any]:
    model = find_model(arguments.model)
    defaults = {
        "num_blocks": -(-arguments.pool_tokens // BLOCK_SIZE),
        "block_size": BLOCK_SIZE,
        "max_model_len": arguments.prompt_len + arguments.turns * (_TURN_TOKENS + arguments.output_len) + BLOCK_SIZE,
        "host_bytes": host_bytes,
    }
    config = make_config(model, defaults | engine_arguments(arguments, model))
    async with DisaggregatedLLM(config) as llm:
        load = _Load(llm, arguments)
        await load.ask(load.prompt(min(512, arguments.prompt_len)), 2)
        result = await load.turns()
        stats = await idle_stats(llm)
    failures = {name: tier["failures"] for name, tier in stats["kv_tiers"].items() if tier["failures"]}
    if failures:
        raise HBServeError(f"copies have failed: {failures}")
    return result | {"tier": stats["kv_tiers"].get("host"), "preemptions": stats["cpu_scheduler"]["preemptions"]}


@dataclass
class _Session:
    """Tokens that were said; ``num_cacheable``: of them, what a cache that forgets nothing has of the next prompt."""

    tokens: list[int]
    num_cacheable: int = 0


class _Load:
    def __init__(self, llm: DisaggregatedLLM, arguments: argparse.Namespace) -> None:
        self._llm, self._arguments = llm, arguments
        self._random = np.random.default_rng(arguments.seed)

    def prompt(self, length: int) -> list[int]:
        tokens: list[int] = self._random.integers(1, self._llm.engine.vocab_size, size=length).tolist()
        return tokens

    async def ask(self, prompt: list[int], num_tokens: int) -> tuple[list[int], int, float]:
        """Return a request's tokens, its cached prompt tokens and its TTFT in seconds."""
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        began, ttft_s, cached = time.monotonic(), 0.0, 0
        tokens: list[int] = []
        async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                if not tokens and delta.token_ids:
                    ttft_s, cached = time.monotonic() - began, delta.num_cached_tokens
                tokens += delta.token_ids
        return tokens, cached, ttft_s

    async def turns(self) -> dict[str, Any]:
        arguments = self._arguments
        count = max(1, round(arguments.working_set * arguments.pool_tokens / arguments.prompt_len))
        sessions = [_Session(self.prompt(arguments.prompt_len)) for _ in range(count)]
        return {"sessions": count, "turns": [await self._turn(sessions, turn) for turn in range(arguments.turns)]}

    async def _turn(self, sessions: list[_Session], turn: int) -> dict[str, float]:
        gate = asyncio.Semaphore(self._arguments.concurrency)
        num_cached, ttfts = 0, []
        num_cacheable = sum(session.num_cacheable for session in sessions)
        num_prompt = sum(len(session.tokens) for session in sessions)

        async def ask(session: _Session) -> None:
            nonlocal num_cached
            async with gate:
                answer, cached, ttft_s = await self.ask(session.tokens, self._arguments.output_len)
            num_cached += cached
            ttfts.append(1000 * ttft_s)
            said = session.tokens + answer
            session.num_cacheable = (len(said) - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last token has no KV
            session.tokens = said + self.prompt(_TURN_TOKENS)

        began = time.monotonic()
        await asyncio.gather(*map(ask, sessions))
        seconds = time.monotonic() - began
        hits = num_cached / num_cacheable if num_cacheable else 0.0
        ttft_p50, ttft_p99 = np.percentile(ttfts, [50, 99])
        print(
            f"  turn {turn + 1}: {len(sessions)} requests in {seconds:.2f} s, {len(sessions) / seconds:.2f} a second; "
            f"TTFT p50 {ttft_p50:.0f}, p99 {ttft_p99:.0f} ms; {num_cached / num_prompt:.1%} of the prompts cached, "
            f"{hits:.1%} of an endless cache's",
            flush=True,
        )
        return {"seconds": seconds, "share_of_endless": hits, "ttft_p50_ms": ttft_p50, "ttft_p99_ms": ttft_p99}

"""``python -m benchmarks kv_tier_loads``: loads on a small KV pool, without a host tier and with one.

turns     sessions whose prompts together are several times as large as the pool. In each turn every session asks
          once, with all that was said before. In the first turn everything is new: what does storing cost? Then:
          how much of each prompt is cached, beside a cache that forgets nothing, and at which rate turns end.
random    new, repeated, growing, best-effort and aborted requests at random, with the tier, and with a disk and a store
          if they are asked for. Every request must have all its tokens, no copy may fail, all blocks must come back,
          and prompts that come again must have the same greedy answers. Sums depend on the batch, except in float32
          (``--dtype``) on the CPU: else an answer may differ from a token on that was nearly as likely as the other
          one, in both answers.
          With ``--faults`` bytes of the disk's file are changed meanwhile, and processes of the store are stopped and
          killed. Then copies may fail, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import tempfile
import time
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.kv_store import RunningStore, running_store
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
from hbserve.errors import ConfigError, HBServeError

_BLOCK_SIZE = 16
_TURN_TOKENS = 128
_IDLE_DEADLINE_S = 30.0
_MIN_RANDOM_TOKENS = 64
_MAX_KNOWN = 300
"""Prompts that come again."""
_NUM_LOGPROBS = 5
_MAX_GAP = 0.25
"""Log-probabilities of two tokens in bfloat16 that may change places."""
_FAULT_INTERVAL_S = 15.0
_STOPPED_S = 4.0
_CHANGED_BYTES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("load", choices=["turns", "random"])
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--pool-tokens", type=positive, default=40_000, help="that the KV pool holds (default: 40000)")
    parser.add_argument("--host-bytes", type=positive, default=40 << 30, help="of the tier (default: 40 GiB)")
    parser.add_argument("--prompt-len", type=positive, default=8192, help="of a first turn, or the longest (random)")
    parser.add_argument("--working-set", type=positive_float, default=5.0, help="turns: multiple of the pool")
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--output-len", type=positive, default=32)
    parser.add_argument("--concurrency", type=positive, default=8, help="open requests (default: 8)")
    parser.add_argument("--seconds", type=positive_float, default=60.0, help="random: requests come (default: 60)")
    parser.add_argument("--disk-bytes", type=positive, help="random: also a tier on disk, in a temporary folder")
    parser.add_argument("--store-bytes", type=positive, help="random: also a Mooncake Store, which runs here meanwhile")
    parser.add_argument("--faults", action="store_true", help="random: damage the disk's file, stop and kill the store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    check_new_file("--json", arguments.json)
    if arguments.faults and (arguments.load != "random" or not (arguments.disk_bytes or arguments.store_bytes)):
        raise ConfigError("--faults: it is for the load random with --disk-bytes or --store-bytes")
    found: dict[str, Any] = {}
    for name in ("none", "host") if arguments.load == "turns" else ("host",):
        with ExitStack() as stack:
            faults = _Faults(arguments.seed)
            tiers = _tiers(arguments, stack, faults) if name == "host" else {"host_bytes": 0}
            found[name] = asyncio.run(_measure(arguments, tiers, faults))
    if arguments.load == "turns":
        for turn, (before, after) in enumerate(zip(found["none"]["turns"], found["host"]["turns"], strict=True), 1):
            print(f"turn {turn}: throughput with the tier is {before['seconds'] / after['seconds']:.2f} times")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _tiers(arguments: argparse.Namespace, stack: ExitStack, faults: _Faults) -> dict[str, Any]:
    """Return the settings of the tiers; ``stack`` ends what they need, and ``faults`` learns where they are."""
    tiers: dict[str, Any] = {"host_bytes": arguments.host_bytes}
    if arguments.disk_bytes is not None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        faults.folder = Path(folder)
        tiers["disk"] = {"path": folder, "bytes": arguments.disk_bytes}
    if arguments.store_bytes is not None:
        faults.store = stack.enter_context(running_store(arguments.store_bytes))
        tiers["store"] = {"master": faults.store.master, "bytes": arguments.store_bytes}
    return tiers


async def _measure(arguments: argparse.Namespace, tiers: dict[str, Any], faults: _Faults) -> dict[str, Any]:
    model = find_model(arguments.model)
    longest = arguments.prompt_len + arguments.turns * (_TURN_TOKENS + arguments.output_len) + _BLOCK_SIZE
    defaults = {
        "num_blocks": -(-arguments.pool_tokens // _BLOCK_SIZE),
        "block_size": _BLOCK_SIZE,
        "max_model_len": longest,
    }
    config = make_config(model, defaults | tiers | engine_arguments(arguments, model))
    async with DisaggregatedLLM(config) as llm:
        load = _Load(llm, arguments, faults)
        await load.ask(load.prompt(min(512, arguments.prompt_len)), 2)
        print(f"{'with tiers' if tiers['host_bytes'] else 'no tier'}:", flush=True)
        making_faults = asyncio.create_task(faults.make()) if arguments.faults else None
        result = await (load.turns() if arguments.load == "turns" else load.random())
        stats = await load.idle()
        if making_faults is not None:
            making_faults.cancel()
            with suppress(asyncio.CancelledError):
                await making_faults
            print(f"  faults: {faults.counts}")
    return result | {"tier": stats["kv_tiers"].get("host"), "preemptions": stats["cpu_scheduler"]["preemptions"]}


@dataclass
class _Session:
    """Tokens that were said; ``num_cacheable``: of them, what a cache that forgets nothing has of the next prompt."""

    tokens: list[int]
    num_cacheable: int = 0
    cached: list[int] = field(default_factory=list)


class _Faults:
    """Faults of the tiers while they are used, one after the other.

    Attributes:
        folder: of the disk tier; None: there is none.
        store: the store that runs; None: there is none.
        counts: how often each was made.
    """

    folder: Path | None = None
    store: RunningStore | None = None

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 1 << 20])
        self.counts = dict.fromkeys(("changed bytes", "stopped", "killed"), 0)

    def expected(self, name: str, are_made: bool) -> set[str]:
        """Return the failures that a tier may have. A store evicts on its own, and says that it is full."""
        kinds = {"full", "missing"} if name == "store" else set()
        if are_made and name == "disk":
            kinds = {"checksum"}
        elif are_made and name == "store":
            kinds |= {"checksum", "timeout", "late", "lookup", "backend"}
        return kinds

    async def make(self) -> None:
        """Make faults until it is cancelled. The store is killed seldom: it ends after ten restarts in ten minutes."""
        while True:
            for make in (self._change_bytes, self._stop, self._change_bytes, self._kill):
                await asyncio.sleep(_FAULT_INTERVAL_S)
                await make()

    async def _change_bytes(self) -> None:
        """Change bytes in blocks of the disk's files that are not zero."""
        for path in [] if self.folder is None else self.folder.glob("*.kv"):
            with path.open("r+b", buffering=0) as file:
                for place in self._random.integers(path.stat().st_size, size=_CHANGED_BYTES).tolist():
                    file.seek(place)
                    [value] = file.read(1)
                    if value:
                        file.seek(place)
                        file.write(bytes([value ^ 1]))
                        self.counts["changed bytes"] += 1

    async def _stop(self) -> None:
        pids = [] if self.store is None else self.store.pids()
        if pids:
            pid = int(self._random.choice(pids))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.counts["stopped"] += 1
                try:
                    await asyncio.sleep(_STOPPED_S)
                finally:
                    os.kill(pid, signal.SIGCONT)

    async def _kill(self) -> None:
        pids = [] if self.store is None else self.store.pids()
        if pids:
            with suppress(ProcessLookupError):
                os.kill(int(self._random.choice(pids)), signal.SIGKILL)
                self.counts["killed"] += 1


@dataclass(eq=False)
class _Answer:
    """Tokens, and log-probabilities of the likeliest ones at each place."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass(eq=False)
class _Known:
    """A prompt, and as much of its answer as was given."""

    prompt: list[int]
    answer: _Answer = field(default_factory=_Answer)

    def gap(self, answer: _Answer) -> float | None:
        """Compare an answer with the known one as far as both go; the longer one is kept.

        Returns:
            None if they agree. Else how much less likely the one's token was in the other at the first place where
            they differ, the larger of both ways round; infinite if it was none of the likeliest.
        """
        known = self.answer
        if len(answer.tokens) > len(known.tokens):
            self.answer = answer
        for place, (token, other) in enumerate(zip(answer.tokens, known.tokens, strict=False)):
            if token != other:
                sides = (known.logprobs[place], other, token), (answer.logprobs[place], token, other)
                return max(likely[first] - likely.get(second, -math.inf) for likely, first, second in sides)
        return None


class _Load:
    def __init__(self, llm: DisaggregatedLLM, arguments: argparse.Namespace, faults: _Faults) -> None:
        self._llm, self._arguments, self._faults = llm, arguments, faults
        self._random = np.random.default_rng(arguments.seed)
        self._num_logprobs = _NUM_LOGPROBS if arguments.load == "random" else None

    def prompt(self, length: int) -> list[int]:
        tokens: list[int] = self._random.integers(1, self._llm.engine.vocab_size, size=length).tolist()
        return tokens

    async def ask(
        self, prompt: list[int], num_tokens: int, priority: Literal["batch"] | None = None, abort_at: int = -1
    ) -> tuple[_Answer, int, float]:
        """Return a request's answer, its cached prompt tokens and its TTFT in seconds."""
        sampling = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, priority=priority, logprobs=self._num_logprobs
        )
        began, ttft_s, cached = time.monotonic(), 0.0, 0
        answer = _Answer()
        async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                if not answer.tokens and delta.token_ids:
                    ttft_s, cached = time.monotonic() - began, delta.num_cached_tokens
                answer.tokens += delta.token_ids
                answer.logprobs += [dict(zip(top.top_ids, top.top, strict=True)) for top in delta.logprobs or ()]
                if len(answer.tokens) == abort_at:
                    return answer, cached, ttft_s
        if len(answer.tokens) != num_tokens:
            raise HBServeError(f"a request has {len(answer.tokens)} of {num_tokens} tokens")
        return answer, cached, ttft_s

    async def idle(self) -> dict[str, Any]:
        """Wait until nothing is stored any more; return the statistics.

        Raises:
            HBServeError: blocks do not come back, or copies have failed.
        """
        deadline = time.monotonic() + _IDLE_DEADLINE_S
        while True:
            stats = await self._llm.client.stats()
            blocks = [instance["kv_blocks"] for instance in stats["gpu_instances"].values()]
            if all(block["free"] == block["total"] for block in blocks):
                break
            if time.monotonic() > deadline:
                raise HBServeError(f"blocks do not come back: {blocks}")
            await asyncio.sleep(0.05)
        for name, tier in stats["kv_tiers"].items():
            if tier["failures"].keys() - self._faults.expected(name, self._arguments.faults):
                raise HBServeError(f"copies have failed: {name}: {tier['failures']}")
        return stats

    # --- sessions --------------------------------------------------------------------------------

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
            said = session.tokens + answer.tokens
            session.num_cacheable = (len(said) - 1) // _BLOCK_SIZE * _BLOCK_SIZE  # the last token has no KV
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

    # --- random ----------------------------------------------------------------------------------

    async def random(self) -> dict[str, Any]:
        arguments, counts = self._arguments, dict.fromkeys(("new", "repeated", "growing", "batch", "aborted"), 0)
        known: list[_Known] = []  # the one that was used last at the end
        num_compared = 0
        gaps: list[float] = []
        end = time.monotonic() + arguments.seconds

        async def client(number: int) -> None:
            nonlocal num_compared
            draw = np.random.default_rng([arguments.seed, number])
            while time.monotonic() < end:
                kind = str(draw.choice(list(counts), p=[0.1, 0.6, 0.15, 0.05, 0.1]))
                counts[kind] += 1
                length = int(draw.integers(min(_MIN_RANDOM_TOKENS, arguments.prompt_len), arguments.prompt_len + 1))
                item = _Known(draw.integers(1, self._llm.engine.vocab_size, size=length).tolist())
                if known and kind in ("repeated", "growing", "aborted"):
                    recency = math.exp(draw.uniform(0.0, math.log(len(known))))  # so that each tier has its share
                    item = known[-int(recency)]
                num_tokens = int(draw.integers(1, arguments.output_len + 1))
                abort_at = int(draw.integers(1, num_tokens + 1)) if kind == "aborted" else -1
                priority: Literal["batch"] | None = "batch" if kind == "batch" else None
                answer, _, _ = await self.ask(item.prompt, num_tokens, priority, abort_at)
                num_compared += bool(item.answer.tokens)
                gap = item.gap(answer)
                if gap is not None:
                    gaps.append(gap)
                if kind == "growing" and len(item.prompt) + len(answer.tokens) <= arguments.prompt_len:
                    item = _Known(item.prompt + answer.tokens)
                if item in known:
                    known.remove(item)
                known.append(item)
                del known[:-_MAX_KNOWN]

        began = time.monotonic()
        await asyncio.gather(*map(client, range(arguments.concurrency)))
        seconds = time.monotonic() - began
        total = sum(counts.values())
        print(f"  {total} requests in {seconds:.1f} s, all with their tokens: {counts}", flush=True)
        widest = max(gaps, default=0.0)
        text = f"  {num_compared} answers compared with earlier ones, {len(gaps)} differ"
        print(f"{text}, at tokens whose log-probabilities differ by at most {widest:.3g}", flush=True)
        stats = await self.idle()
        devices = [instance["device"] for instance in stats["gpu_instances"].values()]
        is_exact = arguments.dtype == "float32" and all(device.startswith("cpu") for device in devices)
        if gaps and (is_exact or widest > _MAX_GAP):
            raise HBServeError(f"answers are not what they were: {sorted(gaps)[-10:]}")
        for name, tier in stats["kv_tiers"].items():
            print(
                f"  {name}: {tier['stored_blocks']} blocks stored, {tier['loaded_blocks']} loaded "
                f"({tier['saved_prompt_tokens']} prompt tokens), {tier['evicted_blocks']} evicted, "
                f"{tier['skipped_blocks']} skipped, failures {tier['failures']}"
            )
        found = {"seconds": seconds, "requests": counts, "compared": num_compared, "different": len(gaps)}
        return found | {"widest_gap": widest, "tiers": stats["kv_tiers"], "faults": self._faults.counts}

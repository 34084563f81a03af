"""``python -m benchmarks kv_tier_random``: random requests on a small KV pool with all tiers: are the answers right?

New, repeated, growing, best-effort and aborted requests go to a system with tiers. The same kind of load goes to one
without tiers for a shorter time, on the same device: the control. Every request must have all its tokens, all blocks
must come back, and no copy may fail. With ``--faults`` the tiers are damaged meanwhile: then copies may fail.

Each answer is compared with the earlier one to the same prompt, token by token with the likeliest tokens'
log-probabilities. These differ a little between two batches, because sums are rounded differently (on the CPU in
float32 they must give the same tokens). So an answer may differ from a token on that was nearly as likely as the
other one. Three numbers tell that from an error:

drift    how far log-probabilities of the same tokens after the same tokens are apart in two answers. Wrong KV changes
         them before it changes a token. It must be at most three times the one that 99 of 100 answers of the control
         do not exceed, with tiers and in the control.
gap      how far the two tokens are apart where two answers part, as the system without tiers computes it afterwards,
         from the prompt and the tokens before. The same bound is for it.
planted  the drift of prompts of which one block was exchanged, in the system without tiers: what a wrong block does.

Where answers drift further apart, both systems are asked again: was the answer wrong or the earlier one, and is what is
stored wrong, too?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from benchmarks.folder_tier import FOLDER_VARIABLE
from benchmarks.kv_store import running_store
from benchmarks.tier_faults import Faults
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

BLOCK_SIZE = 16
_IDLE_DEADLINE_S = 30.0
_MIN_TOKENS = 64
_MAX_KNOWN = 300
"""Prompts that come again."""
_NUM_LOGPROBS = 5
_MAX_JUDGED = 600
_NUM_PLANTED = 24
_MIN_PLANTED_TOKENS = 8
_BOUND = 3.0
"""Multiple of the drift of 99 of 100 answers of the control that a drift and a gap may have."""
_REPORT_S = 60.0
_MAX_KEPT = 20
"""Comparisons with the widest drift, which may be looked at afterwards."""
_Item = TypeVar("_Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--pool-tokens", type=positive, default=12_000, help="that the KV pool holds (default: 12000)")
    parser.add_argument("--host-bytes", type=positive, default=8 << 30, help="of the tier (default: 8 GiB)")
    parser.add_argument("--disk-bytes", type=positive, help="also a tier on disk, in a temporary folder")
    parser.add_argument("--store-bytes", type=positive, help="also a store, which runs here meanwhile")
    parser.add_argument(
        "--store", choices=["mooncake", "folder"], default="mooncake", help="folder: a class of one's own"
    )
    parser.add_argument("--faults", action="store_true", help="damage the files, stop and kill the store")
    parser.add_argument("--prompt-len", type=positive, default=1024, help="of the longest (default: 1024)")
    parser.add_argument("--output-len", type=positive, default=32)
    parser.add_argument("--concurrency", type=positive, default=12, help="open requests (default: 12)")
    parser.add_argument("--seconds", type=positive_float, default=60.0, help="requests come (default: 60)")
    parser.add_argument("--control-seconds", type=positive_float, default=60.0, help="without tiers (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load, print, and write the JSON file."""
    check_new_file("--json", arguments.json)
    if arguments.faults and not (arguments.disk_bytes or arguments.store_bytes):
        raise ConfigError("--faults: it needs --disk-bytes or --store-bytes")
    with ExitStack() as stack:
        faults = Faults(arguments.seed)
        found = asyncio.run(_measure(arguments, _tiers(arguments, stack, faults), faults))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["errors"]:
        raise HBServeError("; ".join(found["errors"]))


def _tiers(arguments: argparse.Namespace, stack: ExitStack, faults: Faults) -> dict[str, Any]:
    """Return the settings of the tiers; ``stack`` ends what they need, and ``faults`` learns where they are."""
    tiers: dict[str, Any] = {"host_bytes": arguments.host_bytes}
    if arguments.disk_bytes is not None:
        faults.disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tiers["disk"] = {"path": str(faults.disk), "bytes": arguments.disk_bytes}
    if arguments.store_bytes is not None and arguments.store == "folder":
        faults.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ[FOLDER_VARIABLE] = str(faults.folder)
        tiers["store"] = {"backend": "benchmarks.folder_tier:FolderTier", "bytes": arguments.store_bytes}
    elif arguments.store_bytes is not None:
        faults.store = stack.enter_context(running_store(arguments.store_bytes))
        tiers["store"] = {"master": faults.store.master, "bytes": arguments.store_bytes}
    return tiers


async def _measure(arguments: argparse.Namespace, tiers: dict[str, Any], faults: Faults) -> dict[str, Any]:
    model = find_model(arguments.model)
    defaults = {
        "num_blocks": -(-arguments.pool_tokens // BLOCK_SIZE),
        "block_size": BLOCK_SIZE,
        "max_model_len": arguments.prompt_len + 2 * arguments.output_len + BLOCK_SIZE,
    }
    async with AsyncExitStack() as stack:

        async def start(settings: dict[str, Any]) -> DisaggregatedLLM:
            config = make_config(model, defaults | settings | engine_arguments(arguments, model))
            return await stack.enter_async_context(DisaggregatedLLM(config))

        llm, plain = await asyncio.gather(start(tiers), start({"host_bytes": 0}))
        print("both systems are ready", flush=True)
        load, control = _Load(llm, arguments, arguments.seconds), _Load(plain, arguments, arguments.control_seconds)
        others = [asyncio.create_task(load.report())]
        if arguments.faults:
            others.append(asyncio.create_task(faults.make()))
        try:
            await asyncio.gather(load.run(), control.run())
        finally:
            for task in others:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        stats = await idle_stats(llm)
        await idle_stats(plain)
        planted = await control.planted(load.known[-_NUM_PLANTED:])
        bound = _BOUND * _spread(control.drifts).get("p99", 0.0)
        for comparison in (one for kept in (load, control) for one in kept.widest if one.drift > bound):
            print(f"apart: {await control.explain(comparison, load)}", flush=True)
        judged = [await control.judge(kept.partings[:_MAX_JUDGED]) for kept in (load, control)]
        devices = [instance["device"] for instance in stats["gpu_instances"].values()]
    is_exact = arguments.dtype == "float32" and all(device.startswith("cpu") for device in devices)
    result = {"bound": bound, "with_tiers": load.summary(judged[0]), "control": control.summary(judged[1])}
    for name in ("with_tiers", "control"):
        print(f"{name}: {json.dumps(result[name])}")
    print(f"bound: {bound:.3g}; planted: {_spread(planted)}")
    print(f"{sum(drift > bound for drift in planted)} of {len(planted)} planted errors are beyond the bound")
    errors = []
    for name, tier in stats["kv_tiers"].items():
        print(
            f"{name}: {tier['stored_blocks']} blocks stored, {tier['loaded_blocks']} loaded "
            f"({tier['saved_prompt_tokens']} prompt tokens), {tier['evicted_blocks']} evicted, "
            f"{tier['skipped_blocks']} skipped, failures {tier['failures']}"
        )
        if tier["failures"].keys() - faults.expected(name, arguments.faults):
            errors.append(f"copies have failed: {name}: {tier['failures']}")
    if arguments.faults:
        print(f"faults: {faults.counts}")
    if is_exact and load.partings:
        errors.append(f"{len(load.partings)} answers are not what they were")
    for kept, gaps, where in ((load, judged[0], ""), (control, judged[1], " without tiers")):
        if not is_exact and kept.widest_drift > bound:
            errors.append(f"log-probabilities are {kept.widest_drift:.3g} apart{where}, more than {bound:.3g}")
        if not is_exact and max(gaps, default=0.0) > bound:
            errors.append(f"answers part at tokens that are {max(gaps):.3g} apart{where}, more than {bound:.3g}")
    return result | {"planted": planted, "tiers": stats["kv_tiers"], "faults": faults.counts, "errors": errors}


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Return the median, two percentiles and the ends of some values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    shares = {"least": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "most": 1.0}
    return {name: float(f"{ordered[math.ceil(share * (len(ordered) - 1))]:.3g}") for name, share in shares.items()}


async def idle_stats(llm: DisaggregatedLLM) -> dict[str, Any]:
    """Wait until nothing is stored any more; return the statistics.

    Raises:
        HBServeError: blocks do not come back.
    """
    deadline = time.monotonic() + _IDLE_DEADLINE_S
    while True:
        stats = await llm.client.stats()
        blocks = [instance["kv_blocks"] for instance in stats["gpu_instances"].values()]
        if all(block["free"] == block["total"] for block in blocks):
            return stats
        if time.monotonic() > deadline:
            raise HBServeError(f"blocks do not come back: {blocks}")
        await asyncio.sleep(0.05)


# --- answers --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """Tokens, and log-probabilities of the likeliest ones at each place.

    Attributes:
        request: what was asked, and when.
        num_cached: prompt tokens that were not computed.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    request: str = ""
    num_cached: int = 0


def compare(answer: Answer, known: Answer) -> tuple[int | None, float]:
    """Compare two answers to one prompt as far as both go.

    Returns:
        The first place where they differ, None if they agree; and their drift up to it.
    """
    drift = 0.0
    for place, (token, other) in enumerate(zip(answer.tokens, known.tokens, strict=False)):
        drift = max(drift, _apart(answer.logprobs[place], known.logprobs[place]))
        if token != other:
            return place, drift
    return None, drift


def _apart(one: dict[int, float], two: dict[int, float]) -> float:
    """Return how far log-probabilities of the same tokens are apart; infinite if there are none, or no numbers."""
    drifts = [abs(one[token] - two[token]) for token in one.keys() & two.keys()]
    return max(drifts) if drifts and all(map(math.isfinite, drifts)) else math.inf


@dataclass(eq=False)
class _Known:
    """A prompt, and as much of its answer as was given."""

    prompt: list[int]
    answer: Answer = field(default_factory=Answer)


@dataclass(frozen=True)
class _Comparison:
    """An answer, and the earlier one that it was compared with."""

    drift: float
    prompt: list[int]
    answer: Answer
    known: Answer


@dataclass(frozen=True)
class _Parting:
    """Where two answers part: the prompt and the tokens before, and the two tokens."""

    tokens: list[int]
    ones: tuple[int, int]


# --- the load -------------------------------------------------------------------------------------


class _Load:
    """Random requests to one system."""

    def __init__(self, llm: DisaggregatedLLM, arguments: argparse.Namespace, seconds: float) -> None:
        self._llm, self._arguments, self._seconds = llm, arguments, seconds
        self._began = time.monotonic()
        self._num_asked = 0
        self.widest: list[_Comparison] = []
        self.known: list[_Known] = []  # the one that was used last at the end
        self.partings: list[_Parting] = []
        self.drifts: list[float] = []
        self._counts = dict.fromkeys(("new", "repeated", "growing", "batch", "aborted"), 0)
        self._num_cached = self._num_prompt = 0

    @property
    def widest_drift(self) -> float:
        return max(self.drifts, default=0.0)

    def summary(self, gaps: list[float]) -> dict[str, Any]:
        """Say what was found; ``gaps``: of the answers that differ."""
        cached = self._num_cached / self._num_prompt if self._num_prompt else 0.0
        return {
            **{"requests": self._counts, "cached": round(cached, 3), "compared": len(self.drifts)},
            **{"different": len(self.partings), "drift": _spread(self.drifts), "gap": _spread(gaps)},
        }

    async def ask(
        self,
        prompt: list[int],
        num_tokens: int,
        priority: Literal["batch"] | None = None,
        abort_at: int = -1,
        num_logprobs: int = _NUM_LOGPROBS,
        kind: str = "judge",
    ) -> Answer:
        """Return a request's answer; ``kind``: for its name.

        Raises:
            HBServeError: if it has not all its tokens.
        """
        sampling = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, priority=priority, logprobs=num_logprobs
        )
        self._num_asked += 1
        request_id = f"{kind}-{self._num_asked}"
        answer = Answer(request=f"{request_id} at {time.monotonic() - self._began:.3f} s, {time.strftime('%H:%M:%S')}")
        async with aclosing(self._llm.stream(prompt, sampling, request_id)) as deltas:
            async for delta in deltas:
                if not answer.tokens:
                    answer.num_cached = delta.num_cached_tokens
                    self._num_cached += delta.num_cached_tokens
                answer.tokens += delta.token_ids
                answer.logprobs += [dict(zip(top.top_ids, top.top, strict=True)) for top in delta.logprobs or ()]
                if len(answer.tokens) == abort_at:
                    return answer
        if len(answer.tokens) != num_tokens:
            raise HBServeError(f"a request has {len(answer.tokens)} of {num_tokens} tokens")
        self._num_prompt += len(prompt)
        return answer

    async def run(self) -> None:
        """Send requests until the time is over, and wait for the last ones."""
        end = time.monotonic() + self._seconds
        await asyncio.gather(*(self._client(number, end) for number in range(self._arguments.concurrency)))

    async def _client(self, number: int, end: float) -> None:
        arguments, known = self._arguments, self.known
        draw = np.random.default_rng([arguments.seed, number])
        while time.monotonic() < end:
            kind = str(draw.choice(list(self._counts), p=[0.1, 0.6, 0.15, 0.05, 0.1]))
            length = int(draw.integers(min(_MIN_TOKENS, arguments.prompt_len), arguments.prompt_len + 1))
            item = _Known(draw.integers(1, self._llm.engine.vocab_size, size=length).tolist())
            if known and kind in ("repeated", "growing", "aborted"):
                recency = math.exp(draw.uniform(0.0, math.log(len(known))))  # so that each tier has its share
                item = known[-int(recency)]
            num_tokens = int(draw.integers(1, arguments.output_len + 1))
            abort_at = int(draw.integers(1, num_tokens + 1)) if kind == "aborted" else -1
            priority: Literal["batch"] | None = "batch" if kind == "batch" else None
            answer = await self.ask(item.prompt, num_tokens, priority, abort_at, kind=kind)
            self._counts[kind] += 1
            self._note(item, answer)
            if kind == "growing" and len(item.prompt) + len(answer.tokens) <= arguments.prompt_len:
                item = _Known(item.prompt + answer.tokens)
            if item in known:
                known.remove(item)
            known.append(item)
            del known[:-_MAX_KNOWN]

    def _note(self, item: _Known, answer: Answer) -> None:
        """Compare an answer with the known one; the longer one is kept."""
        if item.answer.tokens and answer.tokens:
            place, drift = compare(answer, item.answer)
            self.drifts.append(drift)
            self.widest.append(_Comparison(drift, item.prompt, answer, item.answer))
            self.widest.sort(key=lambda comparison: -comparison.drift)
            del self.widest[_MAX_KEPT:]
            if place is not None:
                ones = answer.tokens[place], item.answer.tokens[place]
                self.partings.append(_Parting(item.prompt + answer.tokens[:place], ones))
        if len(answer.tokens) > len(item.answer.tokens):
            item.answer = answer

    async def report(self) -> None:
        """Print how far it is, now and then, until it is cancelled."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(_REPORT_S)
            tiers = (await self._llm.client.stats())["kv_tiers"]
            loaded = {name: tier["loaded_blocks"] for name, tier in tiers.items()}
            print(
                f"{time.monotonic() - began:.0f} s: {sum(self._counts.values())} requests, {len(self.drifts)} "
                f"compared, {len(self.partings)} differ, drift {self.widest_drift:.3g}, blocks loaded {loaded}, "
                f"{_own_memory() / 1e9:.2f} GB of memory of one's own",
                flush=True,
            )

    # --- judgements, by a system without tiers ---------------------------------------------------

    async def judge(self, partings: list[_Parting]) -> list[float]:
        """Return how far the two tokens of each parting are apart; infinite if one is none of the likeliest."""

        async def gap(parting: _Parting) -> float:
            answer = await self.ask(parting.tokens, 1, num_logprobs=2 * _NUM_LOGPROBS)
            one, two = (answer.logprobs[0].get(token, -math.inf) for token in parting.ones)
            return abs(one - two) if math.isfinite(one) and math.isfinite(two) else math.inf

        return await self._all(gap, partings)

    async def explain(self, comparison: _Comparison, other: _Load) -> str:
        """Say which of two answers is not what this system gives, and whether another one gives it still."""
        longest = max((comparison.answer, comparison.known), key=lambda answer: len(answer.tokens))
        own = await self.ask(comparison.prompt, len(longest.tokens))
        again = await other.ask(comparison.prompt, len(longest.tokens))
        answers = {"the answer": comparison.answer, "the earlier one": comparison.known, "one more": again}
        lines = [f"{len(comparison.prompt)} prompt tokens; the system without tiers gives {own.tokens}"]
        for name, answer in answers.items():
            lines.append(f"  {name} ({answer.request}, {answer.num_cached} cached): {answer.tokens}")
            apart = [_apart(*pair) for pair in zip(answer.logprobs, own.logprobs, strict=False)]
            lines.append(f"    drift from it at each place: {' '.join(f'{drift:.2g}' for drift in apart)}")
            lines.append(f"    its first places: {answer.logprobs[:2]}")
        return "\n".join(lines)

    async def planted(self, items: list[_Known]) -> list[float]:
        """Exchange one block of known prompts, and return how far their answers drift."""
        draw = np.random.default_rng(self._arguments.seed)

        async def drift(item: _Known) -> float:
            place = int(draw.integers(len(item.prompt) // BLOCK_SIZE)) * BLOCK_SIZE
            other = draw.integers(1, self._llm.engine.vocab_size, size=BLOCK_SIZE).tolist()
            prompt = item.prompt[:place] + other + item.prompt[place + BLOCK_SIZE :]
            return compare(await self.ask(prompt, len(item.answer.tokens)), item.answer)[1]

        return await self._all(drift, [item for item in items if len(item.answer.tokens) >= _MIN_PLANTED_TOKENS])

    async def _all(self, ask: Callable[[_Item], Awaitable[float]], items: list[_Item]) -> list[float]:
        gate = asyncio.Semaphore(self._arguments.concurrency)

        async def one(item: _Item) -> float:
            async with gate:
                return await ask(item)

        return list(await asyncio.gather(*map(one, items)))


def _own_memory() -> int:
    """Return the bytes of memory that this process and those below it share with no other process or file."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            total += 1024 * int(fields.get("RssAnon", "0 kB").split()[0])
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return total

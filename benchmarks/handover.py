"""The cost of the hand-over from prefill to decode in a running system, beside a unified one.

One start of each system serves all its measurements: requests that come alone, for prompts of several
lengths, and decoding streams with and without prompts that are prefilled meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.bench.arguments import add_engine_arg, default_load_format, find_model, make_config
from hbserve.errors import ConfigError, HBServeError

_STREAM_CONTEXT = 1024
_SHORT_OUTPUT = 4
_STREAMS_TIMEOUT_S = 60.0
_ROUNDS = 3


@dataclass(frozen=True)
class HandoverOptions:
    """Options of the measurement.

    Attributes:
        backends: values of ``kv_transfer.backend``; every backend gets a system of its own.
        prompt_lens: tokens of requests that come alone; prompts of the second length arrive beside decode.
        repeats: requests of each length; medians are shown.
        num_streams: streams that decode at once; 0: leave that part out.
        seconds: time of watching the streams alone, beside prompts, and beside cached prompts, each.
        engine: arguments of the engine beside the model.
        protocol: value of ``kv_transfer.mooncake_protocol``.
        json: file for the results; None: none.
    """

    model: Path
    backends: tuple[str, ...]
    prompt_lens: tuple[int, ...]
    repeats: int
    num_streams: int
    seconds: float
    engine: dict[str, Any]
    protocol: str | None
    json: Path | None

    def config(self, mode: str, **arguments: Any) -> PdDisaggConfig:
        """Return the configuration of one system. An argument ``gpu_instances`` holds for the disaggregated ones only.

        Raises:
            ConfigError: naming the argument that cannot be honoured.
        """
        longest = max(*self.prompt_lens, self._longest_stream) + _SHORT_OUTPUT
        defaults = {"load_format": default_load_format(self.model), "log_level": "WARNING", "max_model_len": longest}
        engine = self.engine | arguments | {"mode": mode}
        if mode == "unified":
            engine.pop("gpu_instances", None)
        if arguments.get("kv_transfer_backend") == "mooncake" and self.protocol is not None:
            engine["kv_mooncake_protocol"] = self.protocol
        return make_config(self.model, defaults | engine)

    @property
    def _longest_stream(self) -> int:
        """Tokens of a stream: more than it can produce while it is watched."""
        return _STREAM_CONTEXT + int(self.seconds * 1000) if self.num_streams else 0

    @property
    def long_prompt(self) -> int:
        """Tokens of the prompts that arrive beside decode."""
        return sorted(self.prompt_lens)[min(1, len(self.prompt_lens) - 1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `options_from`."""
    parser.add_argument(
        "--model", help="measure whole systems with this model (a folder, or a shape under configs/models)"
    )
    parser.add_argument(
        "--prompt-lens", default="4096,8192,32768", help="with --model: tokens (default: 4096,8192,32768)"
    )
    parser.add_argument("--streams", type=int, default=32, help="with --model: decoding at once (default: 32; 0: none)")
    parser.add_argument("--seconds", type=float, default=4.0, help="with --model: they are watched (default: 4)")
    add_engine_arg(parser)


def options_from(arguments: argparse.Namespace) -> HandoverOptions:
    """Read what `add_arguments` has declared.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    sizes = arguments.prompt_lens.split(",")
    if not all(size.isdecimal() and int(size) > 1 for size in sizes):
        raise ConfigError(f"--prompt-lens: {arguments.prompt_lens!r} is not a list of numbers above 1")
    if arguments.streams < 0 or arguments.seconds <= 0 or arguments.repeats < 1:
        raise ConfigError("--streams, --seconds, --repeats: must be positive")
    return HandoverOptions(
        model=find_model(arguments.model),
        backends=tuple(arguments.backend.split(",")),
        prompt_lens=tuple(int(size) for size in sizes),
        repeats=arguments.repeats,
        num_streams=arguments.streams,
        seconds=arguments.seconds,
        engine={"device": arguments.device} | dict(arguments.engine_arg),
        protocol=arguments.protocol,
        json=arguments.json,
    )


@dataclass(frozen=True)
class Alone:
    """Medians of requests that had the system for themselves.

    Attributes:
        second_ms: from the first token to the second, which waits for the hand-over.
        moved_bytes, gb_per_s: size of a prompt's blocks, and their rate while they moved.
        exposed_ms: from the end of the prefill to the arrival of the last block.
    """

    prompt_len: int
    ttft_ms: float
    second_ms: float
    moved_bytes: float = 0.0
    gb_per_s: float = 0.0
    exposed_ms: float = 0.0


@dataclass(frozen=True)
class Beside:
    """99th percentiles of the gaps between the tokens of decoding streams.

    Attributes:
        alone_ms: while nothing else happens.
        joined_ms: while requests join them at the same pace, with prompts that both sides have in their caches:
            the load of ``beside_ms`` without prefill and transfer.
        beside_ms: while prompts are prefilled and arrive.
    """

    alone_ms: float
    joined_ms: float
    beside_ms: float
    num_prompts: int


@dataclass(frozen=True)
class Measured:
    """Measurements of one system."""

    name: str
    alone: list[Alone]
    beside: Beside | None


def run(options: HandoverOptions) -> None:
    """Measure, print tables and write the JSON file.

    Raises:
        HBServeError: if the unified system cannot be started. A backend whose system cannot is reported and left out.
    """
    systems: list[Measured] = []
    for name in ("unified", *options.backends):
        others = {} if name == "unified" else {"kv_transfer_backend": name}
        config = options.config(mode="disaggregated" if others else "unified", **others)
        try:
            systems.append(asyncio.run(_measure(options, name, config)))
        except HBServeError as error:
            if not systems:
                raise
            print(f"{name}: {error}", flush=True)
        _save(options, systems)
    _show(options, systems)


def _save(options: HandoverOptions, systems: list[Measured]) -> None:
    """Write the results so far, after each system: the run may be ended at any time."""
    if options.json is not None:
        document: dict[str, Any] = {"benchmark": "handover", "model": options.model.name, "engine": options.engine}
        document["systems"] = [asdict(system) for system in systems]
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _show(options: HandoverOptions, systems: list[Measured]) -> None:
    unified = {alone.prompt_len: alone.ttft_ms for alone in systems[0].alone}
    print(f"\n{options.model.name}: one prefill and one decode instance; requests that come alone, medians")
    print(
        f"{'system':>10} {'prompt':>7} {'TTFT ms':>9} {'/unified':>9} {'2nd ms':>8} {'moved MiB':>10} {'GB/s':>7} "
        f"{'exposed ms':>11} {'of TTFT':>8}"
    )
    for system in systems:
        for alone in system.alone:
            print(
                f"{system.name:>10} {alone.prompt_len:7} {alone.ttft_ms:9.2f} "
                f"{alone.ttft_ms / unified[alone.prompt_len]:9.3f} {alone.second_ms:8.2f} "
                f"{alone.moved_bytes / (1 << 20):10.1f} {alone.gb_per_s:7.1f} {alone.exposed_ms:11.2f} "
                f"{alone.exposed_ms / alone.ttft_ms:8.1%}"
            )
    if options.num_streams:
        what = f"{options.long_prompt}-token prompts"
        print(f"\n{options.num_streams} streams decode: 99th percentile of the gaps between their tokens")
        print(
            f"{'system':>10} {'alone ms':>9} {'joined ms':>10} {'beside ' + what + ' ms':>32} "
            f"{'/alone':>7} {'/joined':>8} {'prompts':>8}"
        )
        for system in systems:
            if (beside := system.beside) is not None:
                print(
                    f"{system.name:>10} {beside.alone_ms:9.2f} {beside.joined_ms:10.2f} {beside.beside_ms:32.2f} "
                    f"{beside.beside_ms / beside.alone_ms:7.2f} {beside.beside_ms / beside.joined_ms:8.2f} "
                    f"{beside.num_prompts:8}"
                )


async def _measure(options: HandoverOptions, name: str, config: PdDisaggConfig) -> Measured:
    started = time.perf_counter()
    async with DisaggregatedLLM(config) as llm:
        print(f"{name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
        probe = _Probe(llm, name)
        alone = []
        for length in options.prompt_lens:
            await probe.request(probe.prompt(length))  # makes the link, and compiles
            rounds = [await probe.alone(length) for _ in range(options.repeats)]
            alone.append(_median(rounds))
        beside = None
        if options.num_streams and config.mode == "disaggregated":
            beside = await probe.beside(options.num_streams, options.seconds, options.long_prompt)
        return Measured(name, alone, beside)


def _median(rounds: list[Alone]) -> Alone:
    fields = [name for name in Alone.__dataclass_fields__ if name != "prompt_len"]
    medians = {name: statistics.median(getattr(alone, name) for alone in rounds) for name in fields}
    return Alone(rounds[0].prompt_len, **medians)


class _Probe:
    """Sends requests to one system and watches when their tokens come."""

    def __init__(self, llm: DisaggregatedLLM, seed: str) -> None:
        self._llm = llm
        self._random = np.random.default_rng(list(seed.encode()))
        self._vocab_size = llm.engine.vocab_size

    def prompt(self, prompt_len: int) -> list[int]:
        """Draw a prompt that no cache holds. Fast, because streams are being watched."""
        tokens: list[int] = self._random.integers(self._vocab_size, size=prompt_len).tolist()
        return tokens

    async def request(self, prompt: list[int]) -> list[float]:
        """Send a request; return when it was sent and its tokens came, on the monotonic clock."""
        times: list[float] = []
        sampling = SamplingParams(temperature=0, max_tokens=_SHORT_OUTPUT, ignore_eos=True)
        times.append(time.monotonic())
        async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                times += [time.monotonic()] * len(delta.token_ids)
        return times

    async def alone(self, prompt_len: int) -> Alone:
        """Measure one request, and the transfer on its link."""
        before = await self._link()
        sent, first, second, *_ = await self.request(self.prompt(prompt_len))
        after = await self._link()
        moved, seconds, exposed_s = (after[key] - before[key] for key in ("bytes", "seconds", "exposed_s"))
        return Alone(
            prompt_len=prompt_len,
            ttft_ms=1e3 * (first - sent),
            second_ms=1e3 * (second - first),
            moved_bytes=moved,
            gb_per_s=moved / seconds / 1e9 if seconds else 0.0,
            exposed_ms=1e3 * exposed_s,
        )

    async def _link(self) -> dict[str, float]:
        links = (await self._llm.client.stats())["kv_transfer"]["links"]
        return next(iter(links.values()), {"bytes": 0.0, "seconds": 0.0, "exposed_s": 0.0})

    async def beside(self, num_streams: int, seconds: float, prompt_len: int) -> Beside | None:
        """Watch streams alone, beside prompts, and beside cached prompts, in turns, because their contexts grow."""
        tokens: list[list[float]] = [[] for _ in range(num_streams)]
        begun = [asyncio.Event() for _ in tokens]
        streams = [asyncio.create_task(self._stream(*pair)) for pair in zip(tokens, begun, strict=True)]
        marks: list[float] = []
        num_prompts = 0
        try:
            async with asyncio.timeout(_STREAMS_TIMEOUT_S):
                await asyncio.gather(*(event.wait() for event in begun))
            for _ in range(_ROUNDS):
                start = time.monotonic()
                await asyncio.sleep(seconds / _ROUNDS)
                middle = time.monotonic()
                prompts: list[list[int]] = []
                while not prompts or time.monotonic() < middle + seconds / _ROUNDS:
                    prompts.append(self.prompt(prompt_len))
                    await self.request(prompts[-1])
                end = time.monotonic()
                period_s = (end - middle) / len(prompts)
                for number, prompt in enumerate(prompts, 1):
                    await self.request(prompt)
                    await asyncio.sleep(end + number * period_s - time.monotonic())
                marks += [start, middle, end, time.monotonic()]
                num_prompts += len(prompts)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        alone, beside, joined = (
            [gap for turn in range(part, len(marks), 4) for gap in _gaps(tokens, marks[turn], marks[turn + 1])]
            for part in range(3)
        )
        if not (alone and beside and joined):
            print(f"no gap between two tokens of a stream is within {seconds:g} s: too short", flush=True)
            return None
        return Beside(1e3 * _p99(alone), 1e3 * _p99(joined), 1e3 * _p99(beside), num_prompts)

    async def _stream(self, times: list[float], begun: asyncio.Event) -> None:
        prompt = self.prompt(_STREAM_CONTEXT)
        room = self._llm.engine.max_model_len - _STREAM_CONTEXT
        sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)
        async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                times += [time.monotonic()] * bool(delta.token_ids)
                if len(times) > 1:  # the hand-over is done
                    begun.set()


def _gaps(tokens: Iterable[list[float]], start: float, end: float) -> list[float]:
    return [
        later - sooner
        for times in tokens
        for sooner, later in itertools.pairwise(times)
        if start <= sooner and later <= end
    ]


def _p99(gaps: list[float]) -> float:
    return sorted(gaps)[math.ceil(0.99 * len(gaps)) - 1]

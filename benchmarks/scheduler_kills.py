"""``python -m benchmarks scheduler_kills``: the scheduler is killed under load, and every token is compared.

Streams run all the time, each one request after the other. The scheduler is killed (or stopped) at random moments. A
request counts as wrong if its tokens differ from those of a run without kills; on a GPU, where another batch size gives
other roundings, if it has more or fewer of them. The pause of the streams is shown in its parts: until the new
scheduler's process is ready, until it takes requests because an instance has registered, and until the streams have
their next token, whose KV is computed again before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stream_load import random_prompt
from hbserve.bench.arguments import default_load_format, find_model
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import HBServeError, RequestFailedError
from hbserve.sampling_params import SamplingParams
from hbserve.system.disaggregated_llm import DisaggregatedLLM

_MODES = ("unified", "disaggregated", "semi_pd")
_NUM_REQUESTS = 16
_TIMEOUT_S = 120.0
_POLL_S = 0.001


@dataclass(frozen=True, kw_only=True)
class Pause:
    """One kill, and how long the streams waited; seconds.

    Attributes:
        process_s: from the signal until the new process is ready.
        hello_s: from there until it takes requests.
        recompute_s: from there until the median stream has its next token.
        whole_s: the sum.
    """

    process_s: float
    hello_s: float
    recompute_s: float
    whole_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="examples/models/hbserve-demo", help="model folder, or the name of a shape")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--modes", default=",".join(_MODES), help="modes, comma-separated")
    parser.add_argument("--kv-backend", default="shm", help="for disaggregated")
    parser.add_argument("--kills", type=int, default=50, help="in all modes together")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL", help="STOP: the scheduler hangs")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=120, help="output tokens of each request")
    parser.add_argument("--interval-s", type=float, default=1.0, help="longest time between recovery and the next kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the results here")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the file.

    Raises:
        RequestFailedError: at the end, if a request failed or was wrong.
    """
    modes = arguments.modes.split(",")
    results: dict[str, Any] = {}
    for number, mode in enumerate(modes):
        num_kills = arguments.kills * (number + 1) // len(modes) - arguments.kills * number // len(modes)
        results[mode] = asyncio.run(_Kills(arguments, mode).run(num_kills))
        _show(mode, results[mode])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))
    bad = {mode: result["problems"] for mode, result in results.items() if result["problems"]}
    if bad:
        raise RequestFailedError(f"requests failed or were wrong: {bad}")


def _show(mode: str, result: dict[str, Any]) -> None:
    print(f"{mode}: {result['kills']} kills, {result['requests']} requests, problems {result['problems'] or 'none'}")
    for part, values in result["seconds"].items():
        print(f"  {part:<12} median {statistics.median(values):.3f} s, longest {max(values):.3f} s", flush=True)


class _Kills:
    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        self._options = options
        self._random = random.Random(options.seed)
        folder = find_model(options.model)
        self._config = PdDisaggConfig.from_arguments(
            str(folder),
            mode=mode,
            device=options.device,
            load_format=default_load_format(folder),
            dtype="float32" if options.device == "cpu" else "auto",
            num_blocks=1024,
            heartbeat_timeout_s=3.0 if options.signal == "STOP" else 10.0,
            max_restarts=10 * options.kills,
            log_level="ERROR",
            **({"kv_transfer_backend": options.kv_backend} if mode == "disaggregated" else {}),
        )
        self._expected: list[list[int]] = []
        self._last_token: dict[int, float] = {}  # by stream, of the request that it has now
        self._num_requests = 0
        self.problems: Counter[str] = Counter()

    async def run(self, num_kills: int) -> dict[str, Any]:
        """Kill the scheduler as often under load; return what has happened, as plain data."""
        async with DisaggregatedLLM(self._config) as llm:
            self._prompts = [random_prompt(32 + 16 * n, n, llm.engine.vocab_size) for n in range(_NUM_REQUESTS)]
            work = [self._request(llm, number, -1) for number in range(_NUM_REQUESTS)]
            self._expected = await asyncio.gather(*work)
            streams = [asyncio.create_task(self._stream(llm, number)) for number in range(self._options.streams)]
            pauses = [await self._kill(llm) for _ in range(num_kills)]
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        seconds = {name: [getattr(pause, name) for pause in pauses] for name in Pause.__dataclass_fields__}
        return {
            "kills": num_kills,
            "requests": self._num_requests,
            "problems": dict(self.problems),
            "seconds": seconds if pauses else {},
        }

    async def _request(self, llm: DisaggregatedLLM, number: int, stream: int) -> list[int]:
        sampling = SamplingParams(
            temperature=0.0 if number % 2 else 0.8, seed=number, max_tokens=self._options.tokens, ignore_eos=True
        )
        token_ids: list[int] = []
        async for delta in llm.stream(self._prompts[number], sampling):
            token_ids += delta.token_ids
            self._last_token[stream] = time.monotonic()
        return token_ids

    async def _stream(self, llm: DisaggregatedLLM, stream: int) -> None:
        for number in itertools.count(stream):
            try:
                token_ids = await self._request(llm, number % _NUM_REQUESTS, stream)
                expected = self._expected[number % _NUM_REQUESTS]
                if len(token_ids) != len(expected):
                    self.problems["wrong number of tokens"] += 1
                elif self._options.device == "cpu" and token_ids != expected:
                    self.problems["wrong tokens"] += 1
            except HBServeError as error:
                self.problems[str(error)] += 1
            self._num_requests += 1

    async def _kill(self, llm: DisaggregatedLLM) -> Pause:
        await asyncio.sleep(self._random.uniform(0.0, self._options.interval_s))
        scheduler, client = llm.launcher.scheduler, llm.client
        pid, killed_at = scheduler.pid, time.monotonic()
        os.kill(pid, signal.SIGKILL if self._options.signal == "KILL" else signal.SIGSTOP)
        await _until(lambda: scheduler.pid != pid)
        await scheduler.wait_ready(time.monotonic() + _TIMEOUT_S)
        ready_at = time.monotonic()
        await _until(lambda: client.restarting is None)
        attached_at = time.monotonic()

        def tokens_since() -> list[float]:
            times = (self._last_token.get(stream, 0.0) for stream in range(self._options.streams))
            return [at for at in times if at > attached_at]

        await _until(lambda: 2 * len(tokens_since()) >= self._options.streams)
        back_at = max(tokens_since())
        return Pause(
            process_s=ready_at - killed_at,
            hello_s=attached_at - ready_at,
            recompute_s=back_at - attached_at,
            whole_s=back_at - killed_at,
        )


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not holds():  # noqa: ASYNC110 - the states of other processes have no event
            await asyncio.sleep(_POLL_S)

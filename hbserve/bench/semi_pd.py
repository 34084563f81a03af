"""``python -m hbserve.bench semi_pd``: what sharing a device costs, and what a change of the split does to streams.

Steady decoding streams, prompts that keep arriving, and on top of them rotations, a lost worker and a
lost resident process. Every token's time is noted, so that the largest gap of any stream around each
event can be set against the gaps without one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from hbserve.bench.model_folder import default_load_format, find_model
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.sampling_params import SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from hbserve.system.disaggregated_llm import DisaggregatedLLM

_SETTLE_TIMEOUT_S = 120.0
_SPLITS = (SMAllocation(70, 50), SMAllocation(60, 40))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="model folder, or the name of a shape (then: random weights)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--streams", type=int, default=64, help="decoding streams")
    parser.add_argument("--context", type=int, default=512, help="tokens of each stream's prompt")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of each arriving prompt")
    parser.add_argument("--interval-s", type=float, default=0.25, help="seconds between arriving prompts")
    parser.add_argument("--window-s", type=float, default=5.0, help="seconds that each steady state is watched")
    parser.add_argument("--rotations", type=int, default=20)
    parser.add_argument("--num-blocks", type=int, help="KV blocks; default: by memory")
    parser.add_argument("--json", type=Path, help="write results and token times here")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table."""
    results = asyncio.run(_Benchmark(arguments).run())
    width = max(len(name) for name in results)
    for name, value in results.items():
        print(f"{name:<{width}}  {value:,.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


class _Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._options = arguments
        self._folder = find_model(arguments.model)
        self._results: dict[str, Any] = {}
        self._tokens: dict[int, list[float]] = {}
        self._events: list[tuple[str, float, float]] = []

    async def run(self) -> dict[str, Any]:
        async with self._system("unified") as llm:
            self._results |= {f"unified: {key}": value for key, value in (await self._alone(llm)).items()}
        async with self._system("semi_pd") as llm:
            manager = llm.supervisors["semi-0"]
            assert isinstance(manager, ProcessRotationManager)
            self._results["resident process: seconds to load"] = manager.get_status()["resident_manager"]["load_s"]
            self._results |= {f"semi_pd: {key}": value for key, value in (await self._alone(llm)).items()}
            for phase in ("decode", "prefill"):
                key = f"{phase} alone, tokens/s"
                self._results[f"semi_pd / unified: {key}"] = (
                    self._results[f"semi_pd: {key}"] / self._results[f"unified: {key}"]
                )
            async with self._load(llm):
                await self._under_load(llm, manager)
        if self._options.json is not None:
            record = {"results": self._results, "events": self._events, "token_times": self._tokens}
            self._options.json.write_text(json.dumps(record))
        return self._results

    @asynccontextmanager
    async def _system(self, mode: str) -> AsyncIterator[DisaggregatedLLM]:
        semi_pd: dict[str, Any] = {}
        if mode == "semi_pd":
            semi_pd = {
                "prefill_percentage": _SPLITS[-1].prefill_percentage,
                "decode_percentage": _SPLITS[-1].decode_percentage,
                "ladder": {"prefill": [100], "decode": [100]},
            }
        config = PdDisaggConfig.from_arguments(
            str(self._folder),
            mode=mode,
            device=self._options.device,
            load_format=default_load_format(self._folder),
            enable_prefix_caching=False,
            num_blocks=self._options.num_blocks,
            memory_fraction=0.7,
            log_level="WARNING",
            max_restarts=100,
            **semi_pd,
        )
        started = time.monotonic()
        async with DisaggregatedLLM(config) as llm:
            self._results[f"{mode}: seconds to start"] = time.monotonic() - started
            yield llm

    def _prompt(self, length: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(1, 1000) for _ in range(length)]

    # --- each phase alone ------------------------------------------------------------------------

    async def _alone(self, llm: DisaggregatedLLM) -> dict[str, float]:
        options = self._options
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        prompts = [self._prompt(options.prompt, seed) for seed in range(16)]
        await llm.generate(prompts[:2], one)
        started = time.monotonic()
        await llm.generate(prompts, one)
        prefill = 16 * options.prompt / (time.monotonic() - started)
        times: list[float] = []

        async def stream(seed: int) -> None:
            many = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
            async for delta in llm.stream(self._prompt(16, seed), many):
                times.extend([time.monotonic()] * len(delta.token_ids))

        await asyncio.gather(*(stream(seed) for seed in range(options.streams)))
        times.sort()
        # Without the beginning and the end, where not all streams are there.
        begin, end = len(times) // 5, len(times) * 4 // 5
        decode = (end - begin) / (times[end] - times[begin])
        return {"prefill alone, tokens/s": prefill, "decode alone, tokens/s": decode}

    # --- both under load -------------------------------------------------------------------------

    @asynccontextmanager
    async def _load(self, llm: DisaggregatedLLM) -> AsyncIterator[None]:
        options = self._options
        ended = asyncio.Event()

        async def stream(index: int) -> None:
            """One user after the other, so that there is always one."""
            times = self._tokens.setdefault(index, [])
            turn = 0
            while not ended.is_set():
                sampling = SamplingParams(temperature=0.8, seed=index, max_tokens=1024, ignore_eos=True)
                prompt = self._prompt(options.context, 1000 * turn + index)
                times.append(float("nan"))  # the gap before a first token is not one between tokens
                stream = llm.stream(prompt, sampling)
                async with contextlib.aclosing(stream):
                    async for delta in stream:
                        times.extend([time.monotonic()] * len(delta.token_ids))
                        if ended.is_set():
                            break
                turn += 1

        async def arrivals() -> None:
            running: set[asyncio.Task[Any]] = set()
            seed = 10**6
            while not ended.is_set():
                seed += 1
                sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
                task = asyncio.create_task(llm.generate(self._prompt(options.prompt, seed), sampling))
                running.add(task)
                task.add_done_callback(running.discard)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), options.interval_s)
            await asyncio.gather(*running)

        tasks = [asyncio.create_task(stream(index)) for index in range(options.streams)]
        tasks.append(asyncio.create_task(arrivals()))
        try:
            while not all(len(times) > 2 for times in self._tokens.values()) or not self._tokens:
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.1)
            yield
        finally:
            ended.set()
            await asyncio.gather(*tasks)

    async def _under_load(self, llm: DisaggregatedLLM, manager: ProcessRotationManager) -> None:
        options, results = self._options, self._results
        await asyncio.sleep(options.window_s)  # what is loaded or compiled at the first use
        started = time.monotonic()
        await asyncio.sleep(options.window_s)
        steady = self._note("steady", started)
        results["steady: ITL p50, ms"], results["steady: ITL p99, ms"] = steady["p50"], steady["p99"]
        results["steady: ITL largest, ms"], results["steady: tokens/s"] = steady["largest"], steady["rate"]
        memory, largest, prepared, seconds, slowed = [_memory_mib()], [], [], [], []
        for index in range(options.rotations):
            started = time.monotonic()
            manager.request_sm_reallocation(_SPLITS[index % len(_SPLITS)])
            assert await asyncio.to_thread(manager.wait_until_settled, _SETTLE_TIMEOUT_S)
            seconds.append(time.monotonic() - started)
            window = self._note("rotation", started)
            largest.append(window["largest"])
            slowed.append(window["rate"] / steady["rate"])
            prepared.append(manager.get_status()["delayed_switching"]["last_preparation_s"])
            await asyncio.sleep(options.window_s / 5)
            memory.append(_memory_mib())
        if options.rotations:
            results["rotations: done"] = manager.get_status()["statistics"]["rotations"]
            results["rotation: seconds from request to ready, median"] = _middle(prepared)
            results["rotation: seconds from request to settled, median"] = _middle(seconds)
            results["rotation: largest gap of a stream, ms, median"] = _middle(largest)
            results["rotation: largest gap of a stream, ms, worst"] = max(largest)
            results["rotation: tokens/s, share of steady, median"] = _middle(slowed)
            results["rotations: GPU memory before, after each, MiB"] = memory
        workers = [worker for worker in manager.get_status()["workers"] if worker["state"] == "active"]
        results["memory per worker, MiB"] = _memory_of([worker["pid"] for worker in workers])
        for name, pid in (
            ("decode worker lost", _current(llm, "decode")),
            ("resident process lost", manager.get_status()["resident_manager"]["resident_process"]["pid"]),
        ):
            started = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert await asyncio.to_thread(manager.wait_until_settled, _SETTLE_TIMEOUT_S)
            results[f"{name}: seconds until all is as before"] = time.monotonic() - started
            await asyncio.sleep(options.window_s)
            results[f"{name}: largest gap of a stream, ms"] = self._note(name, started)["largest"]

    def _note(self, name: str, started: float) -> dict[str, float]:
        """Gaps between the tokens of each stream from ``started`` until now, ms."""
        ended = time.monotonic()
        self._events.append((name, started, ended))
        gaps: list[float] = []
        count = 0
        for times in self._tokens.values():
            for earlier, later in pairwise(times):
                if started <= later <= ended:
                    count += 1
                    if earlier == earlier:  # not the mark of a new request
                        gaps.append(1000 * (later - earlier))
            if times and times[-1] == times[-1] and ended - times[-1] > 0:
                gaps.append(1000 * (ended - max(times[-1], started)))  # a stream that stands still has no later token
        gaps.sort()
        return {
            "p50": gaps[len(gaps) // 2],
            "p99": gaps[len(gaps) * 99 // 100],
            "largest": gaps[-1],
            "rate": count / (ended - started),
        }


def _current(llm: DisaggregatedLLM, role: str) -> int:
    """The process id of the worker that gets a phase's plans now."""
    workers = llm.get_system_stats()["gpu_instances"]["semi-0"]["workers"].values()
    current = [worker for worker in workers if worker["role"] == role and worker["is_current"]]
    return int(current[0]["pid"])


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _nvidia_smi(query: str) -> list[list[str]]:
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return [[part.strip() for part in line.split(",")] for line in lines]


def _memory_mib() -> int | None:
    """GPU memory in use."""
    rows = _nvidia_smi("--query-gpu=memory.used")
    return int(rows[0][0]) if rows else None


def _memory_of(pids: list[int]) -> dict[int, str]:
    """GPU memory by process, as the driver counts it."""
    rows = _nvidia_smi("--query-compute-apps=pid,used_memory")
    return {int(row[0]): row[1] for row in rows if int(row[0]) in pids}

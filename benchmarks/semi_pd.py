"""``python -m benchmarks semi_pd``: the cost of sharing a device, and what streams feel when the split changes.

It has parts: each phase alone against ``unified``; the cost of a change of the share level; steady streams
beside arriving prompts; rotations; a lost worker, a lost resident process and, on a GPU, a fault of the
device. Each result is printed as soon as it is known. A part that fails leaves the others standing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_fault, semi_pd_plot
from benchmarks.semi_pd_steering import SETTLE_TIMEOUT_S, current_pid, end_standbys, rotate, until, until_asleep
from benchmarks.stream_load import StreamLoad, StreamWindow, random_prompt
from hbserve.bench import plots
from hbserve.bench.arguments import default_load_format, find_model
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import RequestFailedError
from hbserve.process import child, exit_core
from hbserve.sampling_params import SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from hbserve.system.disaggregated_llm import DisaggregatedLLM

_PART_TIMEOUT_S = 240.0
_SPLITS = (SMAllocation(50, 50), SMAllocation(60, 40))  # no multiprocessor is in both shares
_NUM_SLEEPERS = 8  # enough for one rotation after the other
_TIME_FOR_LOSSES_S = 45.0
_LONG_GAP_S = 0.016
"""The file has the gaps between tokens of a stream from this length."""
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", required=True, help="model folder, or the name of a shape (then: random weights)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--streams", type=int, default=64, help="decoding streams")
    parser.add_argument("--context", type=int, default=512, help="tokens of each stream's prompt")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of each arriving prompt")
    parser.add_argument("--interval-s", type=float, default=0.25, help="seconds between arriving prompts")
    parser.add_argument("--window-s", type=float, default=4.0, help="seconds that each steady state is watched")
    parser.add_argument("--rotations", type=int, default=20, help="how many, unless the time is up before")
    parser.add_argument("--time-s", type=float, default=150.0, help="for the whole command; it ends rotations early")
    parser.add_argument("--num-blocks", type=int, help="KV blocks; default: by memory")
    parser.add_argument("--json", type=Path, help="write results and token times here, after each part")
    parser.add_argument("--plot", type=Path, help="draw the gaps between tokens around a rotation")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the files.

    Raises:
        RequestFailedError: at the end, if a part failed.
    """
    if arguments.plot is not None:
        plots.require_matplotlib("--plot")
    benchmark = _Benchmark(arguments)
    asyncio.run(benchmark.run())
    if benchmark.failed:
        raise RequestFailedError(f"not everything could be measured: {', '.join(benchmark.failed)}")


class _Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._options = arguments
        self._folder = find_model(arguments.model)
        self._deadline = time.monotonic() + arguments.time_s
        self._results: dict[str, Any] = {}
        self._events: list[tuple[str, float, float]] = []
        self._load: StreamLoad | None = None
        self._first_rotation: tuple[float, float, float] | None = None
        self.failed: list[str] = []

    async def run(self) -> None:
        await self._part("unified", self._unified())
        await self._part("semi_pd", self._semi_pd())
        if self._options.plot is not None and self._load is not None and self._first_rotation is not None:
            title = f"{self._options.model}, {self._options.streams} streams, {_SPLITS[-1]} to {_SPLITS[0]}"
            semi_pd_plot.draw(self._load.token_times, self._first_rotation, title, self._options.plot)

    # --- results ---------------------------------------------------------------------------------

    async def _part(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(_PART_TIMEOUT_S):
                await work
        except Exception as error:
            self.failed.append(name)
            self._put(f"{name}: FAILED", repr(error)[:500])
        self._write()

    def _put(self, name: str, value: Any) -> None:
        self._results[name] = value
        print(f"{name:<58}  {f'{value:,.3f}' if isinstance(value, float) else value}", flush=True)

    def _write(self) -> None:
        if self._options.json is None:
            return
        streams = self._load.token_times if self._load is not None else {}
        long_gaps = {
            index: [
                (round(start, 4), round(1000 * (end - start), 2))
                for times in requests
                for start, end in itertools.pairwise(times)
                if end - start >= _LONG_GAP_S
            ]
            for index, requests in streams.items()
        }
        record = {"results": self._results, "events": self._events, "long_gaps": long_gaps}
        self._options.json.write_text(json.dumps(record))

    # --- systems ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _system(self, mode: str) -> AsyncIterator[DisaggregatedLLM]:
        semi_pd: dict[str, Any] = {}
        if mode == "semi_pd":
            semi_pd = {
                "prefill_percentage": _SPLITS[-1].prefill_percentage,
                "decode_percentage": _SPLITS[-1].decode_percentage,
                "ladder": {"prefill": [100], "decode": [100]},
                "num_sleepers": _NUM_SLEEPERS,
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
            self._put(f"{mode}: seconds to start", time.monotonic() - started)
            yield llm

    async def _unified(self) -> None:
        async with self._system("unified") as llm:
            await self._alone("unified", llm)

    async def _semi_pd(self) -> None:
        async with self._system("semi_pd") as llm:
            child.freeze_heap()  # this process is the streams' client, so it does as an API server
            exit_core.keep_off()
            manager = llm.supervisors["semi-0"]
            assert isinstance(manager, ProcessRotationManager)
            await self._part("what workers hold", self._workers(manager))
            await self._part("each phase alone", self._against_unified(llm))
            await self._part("change of rung", self._level_change(llm, manager))
            self._load = StreamLoad(llm, self._options.streams, self._options.context)
            arrivals = self._load.arrivals(self._options.prompt, self._options.interval_s, 2)
            async with self._load.running(), arrivals:
                await self._part("steady load", self._steady(self._load))
                await self._part("rotations", self._rotations(self._load, manager))
                await self._part("lost worker", self._lost_worker(llm, self._load, manager))
                await self._part("lost memory", self._lost_memory(self._load, manager))
            self._put("requests of the load that failed", len(self._load.failures))
            for reason in sorted(set(self._load.failures)):
                self._put(f"failed: {reason[:100]}", self._load.failures.count(reason))

    # --- parts -----------------------------------------------------------------------------------

    async def _workers(self, manager: ProcessRotationManager) -> None:
        """Put times and memory of the four workers that were made when the system started."""
        await until_asleep(manager, _NUM_SLEEPERS)
        await asyncio.sleep(2 * manager.resident_manager.heartbeat_interval)  # by then its report of free memory is new
        status = manager.get_status()
        resident = status["resident_manager"]
        self._put("resident process: seconds to load", resident["load_s"])
        workers = [worker for worker in status["workers"] if worker["state"] == "active"]
        self._put_start("worker of the first split", workers)
        for worker in workers:
            self._put(f"{worker['worker_id']}: its own allocations, MiB", worker["memory_bytes"] / _MIB)
        # Free memory that the device has lost since before the workers, contexts and modules included.
        taken = resident["free_bytes_at_start"] - resident["free_bytes"]
        self._put("memory per worker, all of it, MiB", taken / len(workers) / _MIB)

    def _put_start(self, which: str, workers: list[dict[str, Any]]) -> None:
        """Put the parts of the workers' start times; they add up to the whole."""
        if not workers:
            return
        for part in workers[0]["start_s"]:
            seconds = [worker["start_s"][part] for worker in workers]
            self._put(f"{which}: {part}, median, ms", 1000 * _middle(seconds))

    async def _alone(self, mode: str, llm: DisaggregatedLLM) -> None:
        options = self._options
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        many = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
        vocab_size = llm.engine.vocab_size
        prompts = [random_prompt(options.prompt, seed, vocab_size) for seed in range(16)]
        best = {"prefill": 0.0, "decode": 0.0}

        async def stream(seed: int, times: list[float]) -> None:
            async for delta in llm.stream(random_prompt(16, seed, vocab_size), many):
                times.extend([time.monotonic()] * len(delta.token_ids))

        for _ in range(2):
            await llm.generate(prompts[:2], one)
            started = time.monotonic()
            await llm.generate(prompts, one)
            best["prefill"] = max(best["prefill"], 16 * options.prompt / (time.monotonic() - started))
            times: list[float] = []
            num_steps, busy_s = _work(llm)
            await asyncio.gather(*(stream(seed, times) for seed in range(options.streams)))
            times.sort()
            # Without the beginning and the end, where not all streams run.
            begin, end = len(times) // 5, len(times) * 4 // 5
            best["decode"] = max(best["decode"], (end - begin) / (times[end] - times[begin]))
            steps_after, busy_after_s = _work(llm)
            ms_per_step = 1000 * (busy_after_s - busy_s) / (steps_after - num_steps)
        self._put(f"{mode}: decode alone, ms of the device per step", ms_per_step)
        for phase, rate in best.items():
            self._put(f"{mode}: {phase} alone, tokens/s", rate)

    async def _against_unified(self, llm: DisaggregatedLLM) -> None:
        await self._alone("semi_pd", llm)
        for phase in ("decode", "prefill"):
            key = f"{phase} alone, tokens/s"
            if f"unified: {key}" in self._results:
                ratio = self._results[f"semi_pd: {key}"] / self._results[f"unified: {key}"]
                self._put(f"semi_pd / unified: {key}", ratio)

    async def _level_change(self, llm: DisaggregatedLLM, manager: ProcessRotationManager) -> None:
        """Measure decode steps with tiny prompts in between, with one decode worker, and with two of one size.

        With two, each prompt costs two changes: to the share and back. All else is the same. Each case is measured
        twice, in turns, because the cost is a small difference of large numbers.
        """
        interval_s = 0.05
        rates: dict[int, list[float]] = {100: [], 99: []}
        for percentage in (100, 99, 100, 99):
            await rotate(manager, SMAllocation(_SPLITS[-1].prefill_percentage, percentage))
            load = StreamLoad(llm, self._options.streams, 16)
            async with load.running(), load.arrivals(16, interval_s, 1):
                await asyncio.sleep(0.5)
                started = time.monotonic()
                await asyncio.sleep(self._options.window_s / 2)
                rates[percentage].append(load.window(started, time.monotonic()).tokens_per_s)
        means = {percentage: 2 / sum(1 / rate for rate in both) for percentage, both in rates.items()}
        for percentage, name in ((100, "100"), (99, "99 or 100")):
            self._put(f"tiny prompts, decode at {name} %: tokens/s", means[percentage])
        lost_s = (1 - means[99] / means[100]) * interval_s
        self._put("change of rung: costs, ms", 1000 * lost_s / 2)
        await rotate(manager, _SPLITS[-1])

    async def _steady(self, load: StreamLoad) -> None:
        await asyncio.sleep(self._options.window_s / 2)  # for what is loaded or compiled at first use
        self._steady_windows = [await self._steady_at(_SPLITS[-1], load)]

    async def _steady_at(self, split: SMAllocation, load: StreamLoad) -> StreamWindow:
        window = await self._watch("steady", load, self._options.window_s)
        for name, gaps in (("", window.running), (" to the second token", window.starting)):
            if not len(gaps.sorted_ms):
                continue
            self._put(f"steady at {split}: ITL{name}, p50, ms", gaps.quantile(0.5))
            self._put(f"steady at {split}: ITL{name}, p99, ms", gaps.quantile(0.99))
            self._put(f"steady at {split}: ITL{name}, largest, ms", gaps.largest)
        self._put(f"steady at {split}: tokens/s", window.tokens_per_s)
        await asyncio.sleep(0.5)  # the evaluation of the window took the streams' time
        return window

    async def _rotations(self, load: StreamLoad, manager: ProcessRotationManager) -> None:
        done: list[_Rotation] = []
        ends = self._deadline - _TIME_FOR_LOSSES_S
        await asyncio.sleep(0.5)  # writing results took the streams' time
        while not done or (len(done) < self._options.rotations - 1 and time.monotonic() < ends):
            await until_asleep(manager, 2)
            done.append(rotation := await self._one_rotation(load, manager, _SPLITS[len(done) % len(_SPLITS)]))
            if len(done) == 1:
                self._put("rotation: first, seconds from request to ready", rotation.prepared_s)
                asked = rotation.asked
                self._first_rotation = (asked, asked + rotation.prepared_s, asked + rotation.seconds)
                self._put_start("worker from a sleeper", rotation.made)
                await until_asleep(manager, _NUM_SLEEPERS)  # the imports of new standby workers belong to the rotation
                self._steady_windows.append(await self._steady_at(_SPLITS[0], load))
        await end_standbys(manager)
        cold = await self._one_rotation(load, manager, _SPLITS[len(done) % len(_SPLITS)])
        self._put("rotation: cold, seconds from request to ready", cold.prepared_s)
        self._put_rotations(load, done, cold)

    def _put_rotations(self, load: StreamLoad, warm: list[_Rotation], cold: _Rotation) -> None:
        """Evaluate all rotations at the end, because the evaluation takes the event loop's time."""
        done = [*warm, cold]
        prepared_s = [rotation.prepared_s for rotation in warm]
        self._put("rotations: done", len(done))
        self._put("rotation: from sleepers, seconds to ready, median", _middle(prepared_s))
        self._put("rotation: from sleepers, seconds to ready, worst", max(prepared_s))
        self._put("rotation: seconds from request to settled, median", _middle([rotation.seconds for rotation in warm]))
        windows = [load.window(rotation.asked, rotation.settled) for rotation in done]
        self._put("rotation: ITL p99, ms, median", _middle([window.running.quantile(0.99) for window in windows]))
        steady = self._steady_windows
        for kind, field in (("gap of a running stream", "running"), ("gap to the second token", "starting")):
            during, before = ([getattr(window, field) for window in part] for part in (windows, steady))
            largest = [gaps.largest for gaps in during if len(gaps.sorted_ms)]
            usual_ms = [gaps.quantile(0.99) for gaps in before if len(gaps.sorted_ms)]
            for word, value in (("median", _middle(largest)), ("worst", max(largest))) if largest else ():
                self._put(f"rotation: largest {kind}, ms, {word}", value)
                if usual_ms:
                    self._put(f"rotation: largest {kind} above its steady p99, ms, {word}", value - max(usual_ms))
        for name, times in (
            ("the change over itself", [(one.asked + one.prepared_s - 0.1, one.settled + 0.2) for one in done]),
            ("the second after a rotation", [(one.settled, one.settled + 1.0) for one in done]),
        ):
            self._put(f"{name}: largest gap, ms, worst", max(load.window(*time).running.largest for time in times))
        usual = sum(window.tokens_per_s for window in steady) / len(steady)
        slowed = [window.tokens_per_s / usual for window in windows]
        self._put("rotation: tokens/s, share of steady, median", _middle(slowed))
        self._put("rotations: device memory taken after each, MiB", [rotation.memory_mib for rotation in done])

    async def _one_rotation(self, load: StreamLoad, manager: ProcessRotationManager, split: SMAllocation) -> _Rotation:
        before = {worker["worker_id"] for worker in manager.get_status()["workers"]}
        asked = time.monotonic()
        await rotate(manager, split)
        settled = time.monotonic()
        status = manager.get_status()
        await asyncio.sleep(
            1.1 * manager.resident_manager.heartbeat_interval
        )  # by then its report of free memory is new
        resident = manager.get_status()["resident_manager"]
        self._events.append((f"rotation to {split}", asked, settled))
        return _Rotation(
            asked,
            status["delayed_switching"]["last_preparation_s"],
            settled - asked,
            [worker for worker in status["workers"] if worker["worker_id"] not in before],
            (resident["free_bytes_at_start"] - resident["free_bytes"]) // _MIB,
        )

    async def _lost_worker(self, llm: DisaggregatedLLM, load: StreamLoad, manager: ProcessRotationManager) -> None:
        started = time.monotonic()
        os.kill(current_pid(llm, "decode"), signal.SIGTERM)
        await self._resumption("decode worker lost", started, load, manager)

    async def _lost_memory(self, load: StreamLoad, manager: ProcessRotationManager) -> None:
        """Lose the memory: on a GPU by a kernel that writes out of bounds, else by killing the resident process."""
        status = manager.get_status()
        if status["mps"] is None:
            name, started = "resident process lost", time.monotonic()
            os.kill(status["resident_manager"]["resident_process"]["pid"], signal.SIGKILL)
        else:
            name = "fault of the GPU"
            variables = {key: value for key, value in status["mps"].items() if key != "is_ours"}
            fault = await asyncio.to_thread(gpu_fault.fault, variables)
            if fault.returncode == 0:
                raise RequestFailedError("the kernel that should fail did not")
            started = time.monotonic()
            told = [line for line in fault.stderr.decode(errors="replace").splitlines() if "CUDA" in line]
            self._put(f"{name}: what the one who made it was told", told[:1])
            await until(lambda: manager.get_status()["statistics"]["recoveries"] > 0)
        await self._resumption(name, started, load, manager)

    async def _resumption(self, name: str, started: float, load: StreamLoad, manager: ProcessRotationManager) -> None:
        resumed_s = await load.until_all_have_tokens(started + 0.2, SETTLE_TIMEOUT_S)
        await asyncio.sleep(0.5)
        self._put(f"{name}: largest gap of a stream, ms", load.window(started, time.monotonic()).running.largest)
        self._put(f"{name}: seconds until every stream goes on", resumed_s + 0.2)
        settled = await asyncio.to_thread(manager.wait_until_settled, SETTLE_TIMEOUT_S)
        self._put(f"{name}: seconds until all workers are back", time.monotonic() - started)
        self._events.append((name, started, time.monotonic()))
        if not settled:
            raise RequestFailedError(str(manager.get_status()["last_error"]))

    async def _watch(self, name: str, load: StreamLoad, seconds: float) -> StreamWindow:
        started = time.monotonic()
        await asyncio.sleep(seconds)
        self._events.append((name, started, time.monotonic()))
        return load.window(started, time.monotonic())


@dataclass(frozen=True)
class _Rotation:
    """Times of one rotation.

    Attributes:
        asked: time of the request, on the monotonic clock.
        prepared_s: until the new workers were ready.
        seconds: until the old workers had ended.
        made: the new workers, as in `ProcessRotationManager.get_status`.
        memory_mib: memory that processes beside the resident one hold then.
    """

    asked: float
    prepared_s: float
    seconds: float
    made: list[dict[str, Any]]
    memory_mib: int

    @property
    def settled(self) -> float:
        """Time when the old workers had ended."""
        return self.asked + self.seconds


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _work(llm: DisaggregatedLLM) -> tuple[int, float]:
    """Return the steps so far, and the seconds that the device took for them."""
    [work] = llm.get_system_stats()["gpu_instances"].values()
    return int(work["steps"]), float(work["busy_s"])

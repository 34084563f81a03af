"""``python -m benchmarks compare``: several systems under the same loads, beside the simulator's numbers.

Each system is started once and serves all loads. Systems that follow each other and differ in the scheduler only share
their instances. A system with an SLO controller is started once per load, since the targets are part of its
configuration. The search for a system's highest rate begins at the simulator's, corrected by how far that was off for
the systems before.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.compared import ComparedSystem, Load, can_share_instances, loads_of
from hbserve import Config, PdDisaggConfig, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    make_config,
    positive,
    positive_float,
)
from hbserve.bench.report import versions
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve import ServeBenchmark
from hbserve.bench.serve_options import ALL_TARGETS, ServeOptions, SloScale
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.target import EngineTarget, start_engine
from hbserve.errors import ConfigError, HBServeError
from hbserve.model_spec import ModelSpec
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.requests import requests_of
from hbserve.simulate.systems import Setting, SimulatedOutcome, System, find_highest_rate, simulate

_FACTOR = 1.15  # between the rates of a search that begins near its end
_SETTLE_S = 2.5
"""Time in which an idle instance captures its CUDA graphs, which one that serves for longer has."""
_GIVE_UP = 0.1  # a run this far below the attainment asked for is given up
_HEADER = (
    f"{'system':24} {'load':10} {'req/s':>7} {'met':>6} | {'TTFT p50':>8} {'p90':>7} {'p99':>7} | "
    f"{'TPOT p50':>8} {'p90':>6} {'p99':>6}"
)
_NO_NAME = " " * 35


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", required=True, help="folder, or a shape under configs/models")
    parser.add_argument(
        "--system",
        action="append",
        required=True,
        metavar="NAME[,KEY=VALUE,…]",
        help="named as for the simulator, with arguments of hbserve.LLM that only this system has; systems of several "
        "GPUs take the first ones",
    )
    parser.add_argument(
        "--trace",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="a load, or chat, code or agents; may be repeated",
    )
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument("--slo-scale", metavar="X[:Y]", help="targets: times a lone request's, measured")
    targets.add_argument(
        "--goodput",
        action="append",
        default=[],
        metavar="TARGETS",
        help="targets, as ttft:500,tpot:50 (milliseconds); once, or once for each load",
    )
    parser.add_argument("--attainment", type=float, default=0.9, help="share of requests that keep them (default: 0.9)")
    parser.add_argument(
        "--duration",
        action="append",
        type=positive_float,
        default=[],
        metavar="S",
        help="of a run's arrivals (default: 20); once, or once for each load",
    )
    parser.add_argument("--min-requests", type=positive, default=40, metavar="N", help="of a run, which then is longer")
    parser.add_argument("--max-input-len", type=positive, metavar="TOKENS", help="longer prompts are cut to this")
    parser.add_argument("--max-output-len", type=positive, metavar="TOKENS", help="cut longer outputs to this")
    parser.add_argument(
        "--rates",
        action="append",
        type=_rates,
        default=[],
        metavar="A,B,…",
        help="requests per second; no search; once, or once for each load",
    )
    parser.add_argument("--max-runs", type=positive, default=4, metavar="N", help="for a system and load (default: 4)")
    parser.add_argument("--time-limit", type=float, default=3600.0, metavar="S", help="for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of step times, for simulator and controller")
    parser.add_argument("--slo", type=json.loads, default={}, metavar="JSON", help="further keys of semi_pd.slo")
    parser.add_argument("--rungs", type=json.loads, default=None, metavar="JSON", help="ladder of slo systems")
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="write the results to this file, after each run"
    )
    add_engine_arguments(parser)
    for action in parser._actions:
        if action.dest in ("mode", "chunk_size"):
            action.help = "of semi-PD systems" if action.dest == "chunk_size" else argparse.SUPPRESS


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in text.split(","))
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: rates are positive")
    return rates


def run(arguments: argparse.Namespace) -> None:
    """Compare; a system that fails is reported, and the others go on.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    check_new_file("--json", arguments.json)
    systems = [ComparedSystem.parse(text) for text in arguments.system]
    if systems[0].system.form == "slo" and not arguments.goodput:
        raise ConfigError("--system: the first one is measured for the targets; it can have no controller")
    asyncio.run(Comparison(arguments, systems).run())


class Comparison:
    """Comparison of systems under loads.

    Args:
        arguments: the arguments that `add_arguments` has declared.
    """

    def __init__(self, arguments: argparse.Namespace, systems: list[ComparedSystem]) -> None:
        self._options = arguments
        self._folder = find_model(arguments.model)
        self._engine = engine_arguments(arguments, self._folder)
        self._profile = load_profile(arguments.profile)
        vocab_size = ModelSpec.load(self._folder).vocab_size
        self._loads = loads_of(arguments, vocab_size)
        self._jobs = [
            (system, loads)
            for system in systems
            for loads in ([[load] for load in self._loads] if system.system.form == "slo" else [self._loads])
        ]
        self._running: tuple[Config, EngineTarget] | None = None
        """The system whose instances run, and what they were started with."""
        self._ending = AsyncExitStack()
        self._measured: list[tuple[dict[str, Any], tuple[Any, ...]]] = []  # runs, and how to simulate them
        self._deadline = time.monotonic() + arguments.time_limit
        self._document: dict[str, Any] = {
            "options": {name: str(value) for name, value in vars(arguments).items() if value not in (None, False, [])},
            "versions": versions(),
            "results": [],
        }

    async def run(self) -> None:
        """Measure, print, write the JSON file."""
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            left = sum(len(loads) for _, loads in self._jobs)
            try:
                for system, loads in self._jobs:
                    share_s = (self._deadline - time.monotonic()) * len(loads) / left
                    left -= len(loads)
                    if share_s < loads[0].duration_s:
                        print(f"{system.name}: no time left", flush=True)
                        continue
                    await self._serve_or_report(system, loads, share_s, pool)
            finally:
                await self._ending.aclose()
            self._show_runs()
            outcomes = await _in_pool(pool, _simulate, [arguments for _, arguments in self._measured])
        for (run, _), outcome in zip(self._measured, outcomes, strict=True):
            run["simulated"] = dataclasses.asdict(outcome)
        self._save()
        self._show_runs()
        self._show_rates()

    def _save(self) -> None:
        self._options.json.write_text(json.dumps(self._document) + "\n", encoding="utf-8")

    # --- one system ------------------------------------------------------------------------------

    async def _serve_or_report(self, system: ComparedSystem, loads: list[Load], share_s: float, pool: Executor) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                until = self._deadline if loads[0].rates else time.monotonic() + share_s
                await self._serve(system, loads, until, pool)
        except (HBServeError, TimeoutError) as error:
            print(f"{system.name}: {type(error).__name__}: {error}", flush=True)
            failed = {"system": system.name, "loads": [load.name for load in loads], "error": repr(error)}
            self._document["results"].append(failed)
            self._save()
            self._running = None
            await self._ending.aclose()

    async def _serve(self, system: ComparedSystem, loads: list[Load], until: float, pool: Executor) -> None:
        started = time.monotonic()
        target = await self._start(self.config_of(system, loads[0].targets).freeze())
        start_s = time.monotonic() - started
        described = await target.describe()
        print(f"\n{system.name}: ready after {start_s:.1f} s", flush=True)
        pools = [instance["kv_blocks"] for instance in described["stats"]["gpu_instances"].values()]
        kv_tokens = min(pool["total"] * pool["block_size"] for pool in pools)
        for number, load in enumerate(loads):
            time_s = (until - time.monotonic()) / (len(loads) - number)
            result = await self._search(target, system, load, kv_tokens, time_s, pool)
            result |= {"start_s": start_s, "config": described["config"], "kv_tokens": kv_tokens}
            self._document["results"].append(result)
            self._save()

    async def _start(self, config: Config) -> EngineTarget:
        if self._running is not None:
            with_config, target = self._running
            if can_share_instances(with_config, config):
                await target.restart_scheduler(config)
                return target
            self._running = None
            await self._ending.aclose()
        engine = start_engine(config, SamplingParams(temperature=0, ignore_eos=True))
        target = await self._ending.enter_async_context(engine)
        self._running = config, target
        await asyncio.sleep(_SETTLE_S)
        return target

    def config_of(self, system: ComparedSystem, targets: RequestTargets | None) -> PdDisaggConfig:
        """Return the configuration of a system.

        Raises:
            ConfigError: if it needs targets and there are none, or an engine argument makes no sense.
        """
        profile = None if self._options.profile is None else str(self._options.profile.absolute())
        slo = {"profile": profile} | self._options.slo
        percentile = 100 * self._options.attainment
        arguments = system.arguments(self._engine, self._options.rungs, slo, targets, percentile)
        return make_config(self._folder, arguments)

    async def _search(
        self, target: EngineTarget, system: ComparedSystem, load: Load, kv_tokens: int, time_s: float, pool: Executor
    ) -> dict[str, Any]:
        """Search the highest rate within a time; return it with the simulator's."""
        deadline = time.monotonic() + time_s
        options = self._options
        serve_options = self._serve_options(system, load)
        if load.targets is None:
            benchmark = ServeBenchmark(target, dataclasses.replace(serve_options, targets=None))
            load.targets = await benchmark.measure_targets(SloScale.parse(options.slo_scale))
            print(f"{load.name}: {load.targets}", flush=True)
        if not (load.rates or load.predicted):
            await self._predict(load, kv_tokens, pool)
        setting = self._setting(system, load.targets, kv_tokens)
        simulated, duration_s = load.predicted.get(system, (None, load.duration_s))

        async def begin_as_configured() -> None:
            # A run must not begin at the split that the controller chose in the run before.
            if system.system.form == "slo" and system.system.allocation is not None:
                await target.set_split(system.system.allocation)

        off_by = math.exp(sum(map(math.log, load.off_by)) / len(load.off_by)) if load.off_by else 1.0
        first = min(off_by * (simulated or 1.0), len(load.source.trace or ()) / duration_s)
        if load.rates:
            first = load.rates[0]
        source = dataclasses.replace(load.source, duration_s=duration_s)
        document = await ServeBenchmark(
            target,
            dataclasses.replace(
                serve_options,
                source=source,
                rate=first,
                targets=load.targets,
                sweep=True,
                sweep_factor=_FACTOR,
                give_up_below=options.attainment - _GIVE_UP,
                time_limit_s=max(1.0, deadline - time.monotonic() - duration_s),
                max_runs=options.max_runs,
                rates=load.rates,
            ),
            begin_as_configured,
        ).run()
        found = document["best_rate"]
        reached = found["interpolated"] or found["rate"] or found["too_high"] / _FACTOR
        if simulated and reached:
            load.off_by.append(reached / simulated)
        for run in document["runs"]:
            self._measured.append(
                (run, (system.system, setting, source, run["summary"]["rate"], run["summary"]["seed"]))
            )
        return {
            "system": system.name,
            "load": load.name,
            "targets": msgspec.to_builtins(load.targets),
            "told_targets": serve_options.told_targets,
            "best_rate": found,
            "simulated_rate": simulated,
            "runs": document["runs"],
        }

    async def _predict(self, load: Load, kv_tokens: int, pool: Executor) -> None:
        """Simulate all systems before the first one is measured, because a simulation takes its processors."""
        assert load.targets is not None
        systems = list(dict.fromkeys(system for system, _ in self._jobs))
        shared = (load.source, load.seed, load.duration_s, self._options.min_requests)
        calls = [(system.system, self._setting(system, load.targets, kv_tokens), *shared) for system in systems]
        load.predicted = dict(zip(systems, await _in_pool(pool, _predict, calls), strict=True))

    def _setting(self, system: ComparedSystem, targets: RequestTargets, kv_tokens: int) -> Setting:
        steps = profiled_predictor(self._profile)
        return Setting(steps, steps, system.sizes(self._engine, kv_tokens), targets, self._options.attainment)

    def _serve_options(self, system: ComparedSystem, load: Load) -> ServeOptions:
        return ServeOptions(
            source=load.source,
            seed=load.seed,
            sampling=SamplingParams(),
            targets=load.targets,
            # A worker with fixed chunks would size its steps by a TPOT target.
            told_targets=ALL_TARGETS if system.system.chunk is None else ("ttft_ms",),
            attainment=self._options.attainment,
            precision=0.03,
            timeout_s=60.0,
        )

    # --- results ---------------------------------------------------------------------------------

    def _runs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield each result that has runs, with each of its runs."""
        for result in self._document["results"]:
            for run in result.get("runs", ()):
                yield result, run

    def _show_runs(self) -> None:
        """Print each run, and below it what was simulated, if it was."""
        print(f"\nmeasured, and below each what is simulated\n{_HEADER}")
        for result, run in self._runs():
            summary = run["summary"]
            name = f"{result['system'][:24]:24} {result['load'][:10]:10}"
            measured = [(summary[key] or {}).get(p, math.nan) for key in ("ttft_ms", "tpot_ms") for p in _PERCENTS]
            print(_row(name, summary["offered_per_s"], summary["attainment"], measured))
            if (simulated := run.get("simulated")) is not None:
                told = [simulated[f"{key}_{p}_ms"] for key in ("ttft", "tpot") for p in _PERCENTS]
                print(_row(_NO_NAME, simulated["rate"], simulated["attainment"], told))
        print(end="", flush=True)

    def _show_rates(self) -> None:
        print(f"\n{'system':24} {'load':10} {'highest':>8} {'good':>7} {'bad':>7} {'simulated':>9}")
        for result in (result for result in self._document["results"] if "runs" in result):
            best = result["best_rate"]
            print(
                f"{result['system'][:24]:24} {result['load'][:10]:10} {best['interpolated'] or math.nan:8.2f} "
                f"{best['rate']:7.2f} {best['too_high']:7.2f} {result['simulated_rate'] or math.nan:9.2f}",
                flush=True,
            )


_PERCENTS = ("p50", "p90", "p99")


def _row(name: str, rate: float, met: float, times: list[float]) -> str:
    ttft = f"{times[0]:8.0f} {times[1]:7.0f} {times[2]:7.0f}"
    return f"{name} {rate:7.2f} {met:6.1%} | {ttft} | {times[3]:8.1f} {times[4]:6.1f} {times[5]:6.1f}"


async def _in_pool(pool: Executor, function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    in_pool = asyncio.get_running_loop().run_in_executor
    return await asyncio.gather(*(in_pool(pool, function, *arguments) for arguments in calls))


def _predict(
    system: System, setting: Setting, source: WorkloadSource, seed: int, duration_s: float, min_requests: int
) -> tuple[float | None, float]:
    """Find the highest rate, and the seconds of runs near it, which decide which requests are in them."""
    found = find_highest_rate(system, setting, source, seed)
    if found is not None and found.rate * duration_s < min_requests:
        duration_s = min_requests / found.rate
        found = find_highest_rate(system, setting, dataclasses.replace(source, duration_s=duration_s), seed)
    return None if found is None else found.rate, duration_s


def _simulate(system: System, setting: Setting, source: WorkloadSource, rate: float, seed: int) -> SimulatedOutcome:
    return simulate(system, setting, requests_of(source.workload(rate, seed)))

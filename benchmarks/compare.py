"""``python -m benchmarks compare``: several systems under the same loads, beside the simulator's numbers.

Each system is started once and serves all loads. A system with an SLO controller is started once per
load, since the targets are part of its configuration. The search for a system's highest rate begins at
the simulator's, corrected by how far that was off for the systems before.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    make_config,
    positive,
)
from hbserve.bench.report import versions
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve import ServeBenchmark
from hbserve.bench.serve_options import ALL_TARGETS, ServeOptions, SloScale
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.target import EngineTarget, start_engine
from hbserve.bench.traces import load_trace
from hbserve.config import SchedulerConfig
from hbserve.errors import ConfigError, HBServeError
from hbserve.model_spec import ModelSpec
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.config import Sizes
from hbserve.simulate.requests import requests_of
from hbserve.simulate.standard_loads import LOADS, standard_trace
from hbserve.simulate.systems import Setting, SimulatedOutcome, System, find_highest_rate, simulate

_FACTOR = 1.15  # between the rates of a search that begins near its end
_SETTLE_S = 2.5
"""Time in which an idle instance captures its CUDA graphs, which one that serves for longer has."""
_GIVE_UP = 0.1  # a run this far below the attainment asked for is given up
_HEADER = (
    f"{'system':18} {'load':12} {'req/s':>7} {'met':>6} | {'TTFT p50':>8} {'p90':>7} {'p99':>7} | "
    f"{'TPOT p50':>8} {'p90':>6} {'p99':>6}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", required=True, help="folder, or a shape under configs/models")
    parser.add_argument(
        "--system",
        action="append",
        required=True,
        help="named as for the simulator; systems of several GPUs take the first ones",
    )
    parser.add_argument(
        "--trace",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="a load, or chat, code or agents; may be repeated",
    )
    parser.add_argument("--slo-scale", required=True, metavar="X[:Y]", help="targets: times a lone request's, measured")
    parser.add_argument("--attainment", type=float, default=0.9, help="share of requests that keep them (default: 0.9)")
    parser.add_argument("--duration", type=float, default=20.0, metavar="S", help="of a run's arrivals (default: 20)")
    parser.add_argument("--min-requests", type=positive, default=40, metavar="N", help="of a run, which then is longer")
    parser.add_argument("--max-input-len", type=positive, metavar="TOKENS", help="longer prompts are cut to this")
    parser.add_argument("--max-output-len", type=positive, metavar="TOKENS", help="cut longer outputs to this")
    parser.add_argument(
        "--rates",
        action="append",
        type=_rates,
        default=[],
        metavar="A,B,…",
        help="requests per second; no search; may be repeated: one for each load, in their order",
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


def _for_each(rates: list[tuple[float, ...]], num_loads: int) -> list[tuple[float, ...]]:
    return rates if len(rates) == num_loads else (rates or [()]) * num_loads


def run(arguments: argparse.Namespace) -> None:
    """Compare; a system that fails is reported, and the others go on.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    check_new_file("--json", arguments.json)
    systems = [System.parse(text) for text in arguments.system]
    if len(arguments.rates) not in (0, 1, len(arguments.trace)):
        raise ConfigError("--rates: give it once, for all loads, or once for each --trace")
    if systems[0].form == "slo":
        raise ConfigError("--system: the first one is measured for the targets; it can have no controller")
    asyncio.run(Comparison(arguments, systems).run())


@dataclass
class _Load:
    """A trace, and the targets of its requests.

    Attributes:
        rates: to run at; empty to search.
        off_by: reached rates over the simulator's, of the systems so far.
        predicted: the simulator's rate for each system, and the seconds of its runs.
    """

    name: str
    source: WorkloadSource
    rates: tuple[float, ...] = ()
    targets: RequestTargets | None = None
    off_by: list[float] = field(default_factory=list)
    predicted: dict[System, tuple[float | None, float]] = field(default_factory=dict)


class Comparison:
    """Comparison of systems under loads.

    Args:
        arguments: the arguments that `add_arguments` has declared.
    """

    def __init__(self, arguments: argparse.Namespace, systems: list[System]) -> None:
        self._options = arguments
        self._folder = find_model(arguments.model)
        self._engine = engine_arguments(arguments, self._folder)
        self._profile = load_profile(arguments.profile)
        vocab_size = ModelSpec.load(self._folder).vocab_size
        self._loads = [
            _Load(
                path.stem,
                WorkloadSource(
                    trace=standard_trace(str(path)) if str(path) in LOADS else load_trace(path),
                    arrivals="trace",
                    duration_s=arguments.duration,
                    max_input_len=arguments.max_input_len,
                    max_output_len=arguments.max_output_len,
                    vocab_size=vocab_size,
                ),
                rates,
            )
            for path, rates in zip(arguments.trace, _for_each(arguments.rates, len(arguments.trace)), strict=True)
        ]
        self._jobs = [
            (system, loads)
            for system in systems
            for loads in ([[load] for load in self._loads] if system.form == "slo" else [self._loads])
        ]
        self._measured: list[tuple[dict[str, Any], tuple[Any, ...]]] = []  # runs, and how to simulate them
        self._deadline = time.monotonic() + arguments.time_limit
        self._document: dict[str, Any] = {
            "options": {name: str(value) for name, value in vars(arguments).items() if value not in (None, False, [])},
            "versions": versions(),
            "results": [],
        }

    async def run(self) -> None:
        """Measure, print, write the JSON file."""
        options = self._options
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            left = sum(len(loads) for _, loads in self._jobs)
            for system, loads in self._jobs:
                share_s = (self._deadline - time.monotonic()) * len(loads) / left
                left -= len(loads)
                if share_s < options.duration:
                    print(f"{system.name}: no time left", flush=True)
                    continue
                try:
                    async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                        until = self._deadline if loads[0].rates else time.monotonic() + share_s
                        await self._serve(system, loads, until, pool)
                except (HBServeError, TimeoutError) as error:
                    print(f"{system.name}: {type(error).__name__}: {error}", flush=True)
                    failed = {"system": system.name, "loads": [load.name for load in loads], "error": repr(error)}
                    self._document["results"].append(failed)
                    self._save()
            outcomes = await _in_pool(pool, _simulate, [arguments for _, arguments in self._measured])
        for (run, _), outcome in zip(self._measured, outcomes, strict=True):
            run["simulated"] = dataclasses.asdict(outcome)
        self._save()
        self._show_rates()

    def _save(self) -> None:
        self._options.json.write_text(json.dumps(self._document) + "\n", encoding="utf-8")

    # --- one system ------------------------------------------------------------------------------

    async def _serve(self, system: System, loads: list[_Load], until: float, pool: Executor) -> None:
        started = time.monotonic()
        config = self.config_of(system, loads[0].targets)
        async with start_engine(config.freeze(), SamplingParams(temperature=0, ignore_eos=True)) as target:
            start_s = time.monotonic() - started
            described = await target.describe()
            print(f"\n{system.name}: ready after {start_s:.1f} s", flush=True)
            await asyncio.sleep(_SETTLE_S)
            pools = [instance["kv_blocks"] for instance in described["stats"]["gpu_instances"].values()]
            kv_tokens = min(pool["total"] * pool["block_size"] for pool in pools)
            for number, load in enumerate(loads):
                time_s = (until - time.monotonic()) / (len(loads) - number)
                result = await self._search(target, system, load, kv_tokens, time_s, pool)
                result |= {"start_s": start_s, "config": described["config"], "kv_tokens": kv_tokens}
                self._document["results"].append(result)
                self._save()

    def config_of(self, system: System, targets: RequestTargets | None) -> PdDisaggConfig:
        """Return the configuration of a system.

        Raises:
            ConfigError: if it needs targets and there are none, or an engine argument makes no sense.
        """
        arguments = dict(self._engine)
        if system.form == "unified":
            arguments["mode"] = "unified"
            if system.chunk is not None:
                largest = int(arguments.get("max_num_seqs", 256)) + system.chunk
                arguments |= {"chunk_size": system.chunk, "max_chunk_prefill_tokens": system.chunk}
                arguments["max_num_batched_tokens"] = max(int(arguments.get("max_num_batched_tokens", 8192)), largest)
        elif system.form == "disaggregated":
            arguments["mode"] = "disaggregated"
        else:
            assert system.allocation is not None
            arguments |= {
                "mode": "semi_pd",
                "prefill_percentage": system.allocation.prefill_percentage,
                "decode_percentage": system.allocation.decode_percentage,
                "mixed": system.allocation.mixed,
                "ladder": {"prefill": [], "decode": []} if system.form == "no_ladder" else self._options.rungs,
            }
            if system.form == "semi_pd":
                arguments["ladder"] = {"prefill": [100], "decode": [100]}
        if system.num_gpus > 1:
            arguments["gpu_instances"] = _instances(system)
        if system.form == "slo":
            if targets is None:
                raise ConfigError("the targets are not known: the first system has failed")
            percentile = 100 * self._options.attainment
            arguments["slo"] = {
                "ttft_target_ms": targets.ttft_ms,
                "tpot_target_ms": targets.tpot_ms,
                "ttft_percentile": percentile,
                "tpot_percentile": percentile,
                "profile": None if self._options.profile is None else str(self._options.profile.absolute()),
                **self._options.slo,
            }
        return make_config(self._folder, arguments)

    async def _search(
        self, target: EngineTarget, system: System, load: _Load, kv_tokens: int, time_s: float, pool: Executor
    ) -> dict[str, Any]:
        """Search the highest rate within a time; return it with the simulator's."""
        deadline = time.monotonic() + time_s
        options = self._options
        serve_options = self._serve_options(system, load)
        if load.targets is None:
            benchmark = ServeBenchmark(target, dataclasses.replace(serve_options, targets=None))
            load.targets = await benchmark.measure_targets(SloScale.parse(options.slo_scale))
            print(f"{load.name}: {load.targets}", flush=True)
            if not load.rates:
                await self._predict(load, kv_tokens, pool)
        setting = self._setting(load.targets, kv_tokens)
        simulated, duration_s = load.predicted.get(system, (None, options.duration))

        async def begin_as_configured() -> None:
            # A run must not begin at the split that the controller chose in the run before.
            if system.form == "slo" and system.allocation is not None:
                await target.set_split(system.allocation)

        off_by = math.exp(sum(map(math.log, load.off_by)) / len(load.off_by)) if load.off_by else 1.0
        first = min(off_by * (simulated or 1.0), len(load.source.trace or ()) / duration_s)
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
            self._measured.append((run, (system, setting, source, run["summary"]["rate"], run["summary"]["seed"])))
        return {
            "system": system.name,
            "load": load.name,
            "targets": msgspec.to_builtins(load.targets),
            "told_targets": serve_options.told_targets,
            "best_rate": found,
            "simulated_rate": simulated,
            "runs": document["runs"],
        }

    async def _predict(self, load: _Load, kv_tokens: int, pool: Executor) -> None:
        """Simulate all systems before the first one is measured, because a simulation takes its processors."""
        assert load.targets is not None
        options, setting = self._options, self._setting(load.targets, kv_tokens)
        systems = list(dict.fromkeys(system for system, _ in self._jobs))
        shared = (setting, load.source, options.seed, options.duration, options.min_requests)
        found = await _in_pool(pool, _predict, [(system, *shared) for system in systems])
        load.predicted = dict(zip(systems, found, strict=True))

    def _setting(self, targets: RequestTargets, kv_tokens: int) -> Setting:
        steps = profiled_predictor(self._profile)
        sizes = Sizes(
            chunk_size=_optional_int(self._engine.get("chunk_size")),
            max_chunk_prefill_tokens=_optional_int(self._engine.get("max_chunk_prefill_tokens")),
            max_num_seqs=int(self._engine.get("max_num_seqs", Sizes.max_num_seqs)),
            kv_tokens=kv_tokens,
            scheduler=SchedulerConfig(policy=self._engine.get("scheduling_policy", SchedulerConfig().policy)),
        )
        return Setting(steps, steps, sizes, targets, self._options.attainment)

    def _serve_options(self, system: System, load: _Load) -> ServeOptions:
        return ServeOptions(
            source=load.source,
            seed=self._options.seed,
            sampling=SamplingParams(),
            targets=load.targets,
            # A worker with fixed chunks would size its steps by a TPOT target.
            told_targets=ALL_TARGETS if system.chunk is None else ("ttft_ms",),
            attainment=self._options.attainment,
            precision=0.03,
            timeout_s=60.0,
        )

    # --- results ---------------------------------------------------------------------------------

    def _show_rates(self) -> None:
        print(f"\nmeasured, and below each the simulator's\n{_HEADER}")
        results = [result for result in self._document["results"] if "runs" in result]
        for result in results:
            for run in result["runs"]:
                summary, simulated = run["summary"], run["simulated"]
                name = f"{result['system']:18} {result['load'][:12]:12}"
                measured = [(summary[key] or {}).get(p, math.nan) for key in ("ttft_ms", "tpot_ms") for p in _PERCENTS]
                print(_row(name, summary["offered_per_s"], summary["attainment"], measured))
                told = [simulated[f"{key}_{p}_ms"] for key in ("ttft", "tpot") for p in _PERCENTS]
                print(_row(" " * 31, simulated["rate"], simulated["attainment"], told))
        print(f"\n{'system':18} {'load':12} {'highest':>8} {'good':>7} {'bad':>7} {'simulated':>9}")
        for result in results:
            best = result["best_rate"]
            print(
                f"{result['system']:18} {result['load'][:12]:12} {best['interpolated'] or math.nan:8.2f} "
                f"{best['rate']:7.2f} {best['too_high']:7.2f} {result['simulated_rate'] or math.nan:9.2f}",
                flush=True,
            )


def _instances(system: System) -> list[dict[str, Any]]:
    """Return the instances of a system of several GPUs, one GPU each."""
    roles = [{"unified": "unified", "disaggregated": ""}.get(system.form, "semi_pd")] * system.replicas
    if system.form == "disaggregated":
        roles = (["prefill"] * system.num_prefill + ["decode"] * system.num_decode) * system.replicas
    return [{"instance_id": f"{role}-{n}", "instance_type": role, "gpu_id": n} for n, role in enumerate(roles)]


_PERCENTS = ("p50", "p90", "p99")


def _optional_int(text: object) -> int | None:
    return None if text is None else int(str(text))


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

"""Mode ``auto`` on one simulated GPU, beside hand-tuned unified workers, static splits, and the bound of any schedule.

    python -m benchmarks auto --azure azure.csv --mooncake mooncake.jsonl --json auto.json

Each part of a trace begins so many requests after its start, and is stretched to a rate. Two standard loads are drawn.
Everything is simulated; the rows of a load have the targets of docs/simulate.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from hbserve.bench.arguments import check_new_file
from hbserve.bench.request_record import RequestTargets, percentile
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import TraceEntry, load_trace
from hbserve.config import InstanceRole, SchedulerConfig
from hbserve.messages.client import OutputBatch
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.policy.profile_store import FoundProfile
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.config import Sizes, make_config
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.standard_loads import standard_load
from hbserve.simulate.systems import Setting, SimulatedOutcome, System, simulate
from hbserve.simulate.world import SimulatedSystem
from hbserve.system.auto_plan import machine_targets

AUTO = "unified"
"""What mode ``auto`` starts on one GPU."""
TUNED = ("unified@512", "unified@1024", "unified@2048")
SPLITS = ("semi_pd@100-100", "semi_pd@80-100")
_FIRST_COME_CHUNK, _LARGE_CHUNK = 2048, 8192
FIRST_COME = f"unified@{_FIRST_COME_CHUNK}"
"""First come, first served, in chunks of 2048 tokens."""
DEFAULT_RATES = {"chat": (8.0, 14.0, 20.0), "code": (4.0, 8.0, 12.0), "agents": (1.5, 2.5, 3.5)}
"""Rates of the standard loads for the comparison without given targets."""
_DEFAULTS_S = 40.0
_DEFAULTS_SEEDS = range(1, 7)
_DEFAULTS_OF_TRACES = {"azure": ((8.0, 14.0, 20.0), 3000, 40.0), "mooncake": ((0.8, 1.4, 2.0), 1800, 100.0)}
"""Rates, requests from the begin of one part to that of the next, and seconds."""
_KV_TOKENS = 811_792  # of Qwen3-8B's shape on an H200
_MAX_INPUT_LEN = 32_768
_HEADER = (
    f"{'load':18} {'req/s':>5} {'bound':>6} {'auto':>6} {'tuned':>6} {'':16} {'split':>6} {'':16} {'fcfs':>6} "
    f"{'of best':>7} {'of bound':>8}"
)


@dataclass(frozen=True)
class Part:
    """A load, its rate, and its targets."""

    load: str
    rate: float
    targets: RequestTargets
    make: Callable[[], list[SimulatedRequest]]


@dataclass
class Row:
    """Attainment of each system under a part, and the bound."""

    load: str
    rate: float
    targets: str
    bound: float
    attainment: dict[str, float]
    outcomes: dict[str, SimulatedOutcome]

    @property
    def auto(self) -> float:
        """Attainment of mode ``auto``."""
        return self.attainment["auto"]

    def best(self, names: tuple[str, ...]) -> tuple[str, float]:
        """Return the best of some systems, and its attainment."""
        name = max(names, key=lambda name: self.attainment[name])
        return name, self.attainment[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--azure", type=Path, metavar="FILE", help="Azure's conversation trace (.csv)")
    parser.add_argument("--mooncake", type=Path, metavar="FILE", help="Mooncake's conversation trace (.jsonl)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="step times (default: built in, 8B on an H200)")
    parser.add_argument(
        "--defaults", action="store_true", help="no targets given: latencies with the machine's, beside first come"
    )
    parser.add_argument("--short", action="store_true", help="the first part of each load only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes to this file")


def run(arguments: argparse.Namespace) -> None:
    """Simulate, print a table with the means, and write the file."""
    check_new_file("--json", arguments.json)
    if arguments.defaults:
        _compare_defaults(arguments)
        return
    rows = []
    print(_HEADER, flush=True)
    for part in _parts(arguments):
        rows.append(_row(part, arguments.profile))
        print(_text(rows[-1]), flush=True)
    for name in dict.fromkeys(row.load.split()[0] for row in rows):
        _print_mean(name, [row for row in rows if row.load.split()[0] == name])
    _print_mean("all", rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _parts(arguments: argparse.Namespace) -> Iterator[Part]:
    azure, mooncake = RequestTargets(ttft_ms=172, tpot_ms=43), RequestTargets(ttft_ms=2400, tpot_ms=48)
    code, agents = RequestTargets(ttft_ms=400, tpot_ms=40), RequestTargets(ttft_ms=3500, tpot_ms=45)
    for path, name, step, rates, seconds, targets in (
        (arguments.azure, "azure", 4000, (18.0, 22.0), 24.0, azure),
        (arguments.mooncake, "mooncake", 2500, (1.8, 2.2), 100.0, mooncake),
    ):
        if path is None:
            continue
        trace = load_trace(path)
        starts = range(0, 5 * step, step)
        for start, rate in ((start, rate) for start in starts for rate in rates):
            yield Part(f"{name} {start}", rate, targets, _of_trace(trace[start:], rate, seconds))
            if arguments.short:
                break
    for name, rates, seconds, targets in (
        ("code", (9.0, 13.0), 60.0, code),
        ("agents", (3.4, 4.2), 80.0, agents),
    ):
        for seed, rate in ((seed, rate) for seed in (1, 2) for rate in rates):
            yield Part(f"{name} {seed}", rate, targets, _drawn(name, rate, round(rate * seconds), seed))
            if arguments.short:
                break


def _of_trace(trace: list[TraceEntry], rate: float, seconds: float) -> Callable[[], list[SimulatedRequest]]:
    source = WorkloadSource(
        trace=trace, arrivals="trace", duration_s=seconds, max_input_len=_MAX_INPUT_LEN, vocab_size=32_000
    )
    return lambda: requests_of(source.workload(rate, 0))


def _drawn(name: str, rate: float, count: int, seed: int) -> Callable[[], list[SimulatedRequest]]:
    return lambda: standard_load(name, rate, count, seed)


def _row(part: Part, profile: Path | None) -> Row:
    steps = profiled_predictor(None if profile is None else load_profile(profile))
    sizes = Sizes(kv_tokens=_KV_TOKENS)
    setting = Setting(steps, steps, sizes, part.targets)
    fcfs = replace(setting, sizes=replace(sizes, scheduler=msgspec.structs.replace(sizes.scheduler, policy="fcfs")))
    outcomes = {name: simulate(System.parse(name), setting, part.make()) for name in (*TUNED, *SPLITS)}
    outcomes["auto"] = simulate(System.parse(AUTO), setting, part.make(), records_misses=True)
    outcomes["fcfs"] = simulate(System.parse(FIRST_COME), fcfs, part.make())
    attainment = {name: outcome.attainment for name, outcome in outcomes.items()}
    return Row(part.load, part.rate, str(part.targets), outcomes["auto"].bound, attainment, outcomes)


def _compare_defaults(arguments: argparse.Namespace) -> None:
    """Print latencies with the targets of the machine, and those of first come, first served without targets."""
    measured = load_profile(arguments.profile)
    steps = profiled_predictor(measured)
    targets = machine_targets(FoundProfile(measured, "", True))
    ours = SchedulerConfig(
        ttft_ms=targets.ttft_ms,
        ttft_ms_per_1k_tokens=targets.ttft_ms_per_1k_tokens,
        tpot_ms=targets.tpot_ms,
        targets_are_soft=True,
    )
    systems = [
        Sizes(kv_tokens=_KV_TOKENS, scheduler=ours),
        *(
            Sizes(
                chunk_size=chunk,
                max_chunk_prefill_tokens=chunk,
                max_num_batched_tokens=chunk,  # decode rows included
                kv_tokens=_KV_TOKENS,
                scheduler=SchedulerConfig(policy="fcfs"),
            )
            for chunk in (_FIRST_COME_CHUNK, _LARGE_CHUNK)
        ),
    ]
    print("TTFT p50, p99 and ITL p99 (ms): auto, first come in chunks of 2048, of 8192; auto over the former")
    for load, rate, parts in _default_loads(arguments):
        rows = []
        for sizes in systems:
            ttfts_ms, itls_ms = [], []
            for make in parts:
                requests = make()
                itls_ms += serve_with_gaps(sizes, steps, requests)
                ttfts_ms += [request.ttft_ms for request in requests]
            ttfts_ms.sort()
            rows.append((percentile(ttfts_ms, 50), percentile(ttfts_ms, 99), percentile(sorted(itls_ms), 99)))
        texts = [" ".join(f"{value:6.0f}" for value in row) for row in rows]
        texts.append(" ".join(f"{ours / first_come:6.3f}" for ours, first_come in zip(rows[0], rows[1], strict=True)))
        print(f"{load:8} {rate:5.1f}  {'   '.join(texts)}", flush=True)


def _default_loads(
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, float, list[Callable[[], list[SimulatedRequest]]]]]:
    """Yield each load of the comparison without targets: its name, rate and parts."""
    for load, rates in DEFAULT_RATES.items():
        for rate in rates:
            yield load, rate, [_drawn(load, rate, round(_DEFAULTS_S * rate), seed) for seed in _DEFAULTS_SEEDS]
    for name, path in (("azure", arguments.azure), ("mooncake", arguments.mooncake)):
        rates, step, seconds = _DEFAULTS_OF_TRACES[name]
        for rate in rates if path is not None else ():
            trace = load_trace(path)
            yield (
                name,
                rate,
                [_of_trace(trace[number * step :], rate, seconds) for number in range(len(_DEFAULTS_SEEDS))],
            )


def serve_with_gaps(sizes: Sizes, steps: StepTimePredictor, requests: list[SimulatedRequest]) -> list[float]:
    """Serve requests with one unified worker; returns the gaps between tokens of a stream, in milliseconds."""
    config = make_config([InstanceRole.UNIFIED], sizes)
    system = SimulatedSystem(config, steps, sizes.num_blocks)
    last: dict[str, float] = {}
    gaps_ms = []

    def note(batch: OutputBatch) -> None:
        now = system.clock.now
        for output in batch.outputs:
            if output.token_ids:
                if output.request_id in last:
                    gaps_ms.append(1000 * (now - last[output.request_id]))
                last[output.request_id] = now

    system.on_outputs = note
    system.serve(requests)
    return gaps_ms


def _text(row: Row) -> str:
    (tuned, at_tuned), (split, at_split) = row.best(TUNED), row.best(SPLITS)
    shares = f"{row.auto / max(at_tuned, at_split):7.3f} {row.auto / row.bound:8.3f}"
    return (
        f"{row.load:18} {row.rate:5.1f} {row.bound:6.3f} {row.auto:6.3f} {at_tuned:6.3f} {tuned:16} {at_split:6.3f} "
        f"{split:16} {row.attainment['fcfs']:6.3f} {shares}"
    )


def _print_mean(name: str, rows: list[Row]) -> None:
    def mean(value: Callable[[Row], float]) -> float:
        return sum(map(value, rows)) / len(rows)

    bests = [row.auto - max(row.best(TUNED)[1], row.best(SPLITS)[1]) for row in rows]
    print(
        f"mean of {name} ({len(rows)}): bound {mean(lambda row: row.bound):.3f}, "
        f"auto {mean(lambda row: row.auto):.3f}, "
        f"best tuned of each part {mean(lambda row: row.best(TUNED)[1]):.3f}, "
        f"best split {mean(lambda row: row.best(SPLITS)[1]):.3f}, fcfs {mean(lambda row: row.attainment['fcfs']):.3f}; "
        f"auto of bound {mean(lambda row: row.auto / row.bound):.3f}, auto - best: least {min(bests):+.3f}"
    )

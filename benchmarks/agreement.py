"""The simulator beside measured runs: how far its attainment is from theirs, by kind of system.

    python -m benchmarks agreement --azure azure.csv --mooncake mooncake.jsonl docs/results/compare_*.json

The files are those of ``python -m benchmarks compare``. Each of their runs is simulated again, by the rules that the
scheduler has now, under the requests, targets, profile and KV of the run. Beside that stands what the simulator said
when the run was measured.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import TraceEntry, load_trace
from hbserve.config import SchedulerConfig
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.config import Sizes
from hbserve.simulate.requests import requests_of
from hbserve.simulate.systems import Setting, System, simulate

_VOCAB_SIZE = 32_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--azure", type=Path, required=True, metavar="FILE")
    parser.add_argument("--mooncake", type=Path, required=True, metavar="FILE")
    parser.add_argument("runs", type=Path, nargs="+", metavar="FILE", help="of `python -m benchmarks compare`")


def run(options: argparse.Namespace) -> None:
    """Simulate every run; print it, then the mean distances."""
    traces = {"azure": load_trace(options.azure), "mooncake": load_trace(options.mooncake)}
    distances: dict[str, list[tuple[float, float]]] = defaultdict(list)
    print(f"{'system':22} {'load':9} {'req/s':>6} {'measured':>8} {'then':>6} {'now':>6}")
    for path in options.runs:
        document = json.loads(path.read_text(encoding="utf-8"))
        for result in document["results"]:
            system, load = System.parse(result["system"]), result["load"]
            setting = _setting(document["options"], result)
            for measured in result.get("runs", ()):
                summary = measured["summary"]
                now = _simulate(system, setting, document["options"], traces[load], summary)
                found, then = summary["attainment"], measured["simulated"]["attainment"]
                print(
                    f"{system.name:22} {load:9} {summary['rate']:6.2f} {found:8.3f} {then:6.3f} {now:6.3f}", flush=True
                )
                distances[_kind(system)].append((abs(then - found), abs(now - found)))
    distances["all"] = [pair for pairs in distances.values() for pair in pairs]
    print("\nmean distance of the attainment from the measured one, in points")
    print(f"{'':16} {'runs':>4} {'then':>6} {'now':>6}")
    for kind, pairs in distances.items():
        then, now = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        print(f"{kind:16} {len(pairs):4} {then:6.1f} {now:6.1f}")


def _kind(system: System) -> str:
    if system.form == "disaggregated":
        return f"{system.num_prefill}P{system.num_decode}D"
    if system.form == "semi_pd" and system.replicas > 1:
        return "two GPUs, mixed"
    return {"unified": "unified", "slo": "controller"}.get(system.form, "fixed split")


def _setting(options: dict[str, str], result: dict[str, Any]) -> Setting:
    """Return the setting in which the runs of a result were measured."""
    given = dict(ast.literal_eval(options.get("engine_arg", "[]")))
    steps = profiled_predictor(load_profile(Path(options["profile"])))
    sizes = Sizes(
        chunk_size=_optional_int(options.get("chunk_size")),
        max_chunk_prefill_tokens=_optional_int(given.get("max_chunk_prefill_tokens")),
        kv_tokens=result["kv_tokens"],
        scheduler=SchedulerConfig(policy=given["scheduling_policy"]),
    )
    targets = RequestTargets(result["targets"]["ttft_ms"], result["targets"]["tpot_ms"])
    return Setting(steps, steps, sizes, targets, float(options["attainment"]))


def _optional_int(value: object) -> int | None:
    return None if value is None else int(str(value))


def _simulate(
    system: System, setting: Setting, options: dict[str, str], trace: list[TraceEntry], summary: dict[str, Any]
) -> float:
    source = WorkloadSource(
        trace=trace,
        arrivals="trace",
        num_requests=summary["num_requests"],
        max_input_len=_optional_int(options.get("max_input_len")),
        max_output_len=_optional_int(options.get("max_output_len")),
        vocab_size=_VOCAB_SIZE,
    )
    requests = requests_of(source.workload(summary["rate"], summary["seed"]))
    return simulate(system, setting, requests).attainment

"""The simulator beside measured runs: how far its attainment is from theirs, by kind of system.

    python -m benchmarks agreement --trace azure.csv --trace mooncake.jsonl docs/results/compare_*.json

The files are those of ``python -m benchmarks compare``. Each of their runs is simulated again, by the rules that the
scheduler has now, under the requests, targets, profile and KV of the run. Of a run that was given up, only the requests
that were answered count, on both sides: the others met no target because the run ended, not because of the system.

`hbserve.system.auto_plan.PREDICTION_ERRORS` are the means that ``--json`` writes to docs/results/agreement.json.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
from pathlib import Path
from typing import Any

from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import TraceEntry, load_trace
from hbserve.config import SchedulerConfig
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.config import Sizes
from hbserve.simulate.requests import requests_of
from hbserve.simulate.standard_loads import LOADS, standard_trace
from hbserve.simulate.systems import Setting, System, simulate

_VOCAB_SIZE = 32_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE", help="of the runs' loads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write runs and distances to this file")
    parser.add_argument("runs", type=Path, nargs="+", metavar="FILE", help="of `python -m benchmarks compare`")


def run(options: argparse.Namespace) -> None:
    """Simulate every run; print it, then the mean distances."""
    traces = {path.stem: load_trace(path) for path in options.trace}
    rows: list[dict[str, Any]] = []
    print(f"{'system':22} {'load':9} {'req/s':>6} {'requests':>8} {'measured':>8} {'simulated':>9}")
    for path in options.runs:
        document = json.loads(path.read_text(encoding="utf-8"))
        for result in document["results"]:
            system, load = System.parse(result["system"]), result["load"]
            setting = _setting(document["options"], result)
            for measured in result.get("runs", ()):
                trace = traces[load] if load in traces else _standard_trace(load, path)
                row = _row(system, setting, document["options"], trace, measured)
                rows.append({"file": path.name, "kind": _kind(system), "system": system.name, "load": load, **row})
                print("{:22} {:9} {:6.2f} {:8} {:8.3f} {:9.3f}".format(*list(rows[-1].values())[2:]), flush=True)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    distances = {kind: _mean_distance([row for row in rows if row["kind"] == kind]) for kind in kinds}
    print("\nmean distance of the simulated attainment from the measured one, in points")
    for kind, distance in (distances | {"all": _mean_distance(rows)}).items():
        print(f"{kind:20} {sum(row['kind'] == kind for row in rows) or len(rows):4} runs {100 * distance:6.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"distances": distances, "runs": rows}, indent=1) + "\n", encoding="utf-8")


def _standard_trace(load: str, path: Path) -> list[TraceEntry]:
    if load not in LOADS:
        raise ConfigError(f"{path}: its load is {load}; give that trace with --trace, in a file of this name")
    return standard_trace(load)


def _mean_distance(rows: list[dict[str, Any]]) -> float:
    distances = [abs(float(row["simulated"]) - float(row["measured"])) for row in rows]
    return round(sum(distances) / len(distances), 4)


def _kind(system: System) -> str:
    """Return the key of a system in ``PREDICTION_ERRORS``, or what else it is."""
    if system.form in ("semi_pd", "no_ladder"):
        return "fixed split" if system.replicas == 1 else "mixed replicas"
    return system.form


def _setting(options: dict[str, str], result: dict[str, Any]) -> Setting:
    """Return the setting in which the runs of a result were measured."""
    given = dict(ast.literal_eval(options.get("engine_arg", "[]")))
    steps = profiled_predictor(load_profile(Path(options["profile"])))
    sizes = Sizes(
        chunk_size=_optional_int(options.get("chunk_size")),
        max_chunk_prefill_tokens=_optional_int(given.get("max_chunk_prefill_tokens")),
        kv_tokens=result["kv_tokens"],
        scheduler=SchedulerConfig(policy=given.get("scheduling_policy", SchedulerConfig().policy)),
    )
    targets = RequestTargets(result["targets"]["ttft_ms"], result["targets"]["tpot_ms"])
    return Setting(steps, steps, sizes, targets, float(options["attainment"]))


def _optional_int(value: object) -> int | None:
    return None if value is None else int(str(value))


def _row(
    system: System, setting: Setting, options: dict[str, str], trace: list[TraceEntry], measured: dict[str, Any]
) -> dict[str, Any]:
    """Simulate the requests of a run, and compare."""
    summary = measured["summary"]
    source = WorkloadSource(
        trace=trace,
        arrivals="trace",
        num_requests=summary["num_requests"],
        max_input_len=_optional_int(options.get("max_input_len")),
        max_output_len=_optional_int(options.get("max_output_len")),
        vocab_size=_VOCAB_SIZE,
    )
    requests = requests_of(source.workload(summary["rate"], summary["seed"]))
    simulate(system, setting, requests)
    counted = [True] * len(requests)
    if summary["cut_short"]:
        answered = {request["index"] for request in measured["requests"] if request["error"] is None}
        counted = [index in answered for index in range(len(requests))]
    num_met = sum(itertools.compress(map(setting.is_met, requests), counted))
    return {
        "rate": summary["rate"],
        "requests": sum(counted),
        "measured": round(summary["num_met"] / sum(counted), 4),
        "simulated": round(num_met / sum(counted), 4),
    }

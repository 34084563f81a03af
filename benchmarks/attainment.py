"""Share of requests within both targets, by rate: lines are simulated, points are measured.

    python -m benchmarks attainment --azure azure.csv --mooncake mooncake.jsonl --lines lines.json
    python -m benchmarks attainment --lines lines.json --measured compare.json --plot attainment.svg

The first command simulates and writes the file of lines. The second draws it, with the runs of files that
`python -m benchmarks compare` wrote for the same loads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.compared import ComparedSystem
from hbserve.bench import plots
from hbserve.bench.arguments import check_new_file
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import load_trace
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.requests import requests_of
from hbserve.simulate.standard_loads import standard_trace
from hbserve.simulate.systems import Setting, simulate

LOADS = {
    "azure": ((13.0, 16.0, 19.0, 22.0, 25.0, 28.0), RequestTargets(ttft_ms=172, tpot_ms=40)),
    "mooncake": ((1.2, 1.6, 2.0, 2.4, 2.8), RequestTargets(ttft_ms=2480, tpot_ms=46)),
    "code": ((5.0, 7.0, 9.0, 11.0, 13.0, 15.0), RequestTargets(ttft_ms=458, tpot_ms=42)),
    "agents": ((2.6, 3.0, 3.4, 3.8, 4.2, 4.6), RequestTargets(ttft_ms=2450, tpot_ms=46)),
}
"""Rates, and targets as measured: 7.5 and 10 times what a lone request took."""
SYSTEMS = {
    "nothing configured": ComparedSystem.parse("unified"),
    "chunks of 1,024 by hand": ComparedSystem.parse("unified,chunk_size=1024,max_chunk_prefill_tokens=1024"),
    "first come, chunks of 2,048": ComparedSystem.parse(
        "unified@2048,scheduling_policy=fcfs,max_num_batched_tokens=2048"
    ),
}
"""Each line's system, by the names of `benchmarks.compare`."""
_BOUND = "bound of any schedule"
_COLORS = ("tab:blue", "tab:orange", "tab:red")
_DURATION_S = 20.0
_TOLERANCE = 0.1
"""Relative difference of a measured TTFT target from the simulated one, at most."""
_KV_TOKENS = 811_792  # of the measured system


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--azure", type=Path, metavar="FILE", help="Azure's conversation trace (.csv)")
    parser.add_argument("--mooncake", type=Path, metavar="FILE", help="Mooncake's conversation trace (.jsonl)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="step times (default: built in, 8B on an H200)")
    parser.add_argument("--lines", type=Path, required=True, metavar="FILE", help="simulated; read if it exists")
    parser.add_argument("--measured", type=Path, nargs="*", default=[], metavar="FILE", help="what compare wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture (.svg, .png)")


def run(arguments: argparse.Namespace) -> None:
    """Simulate, unless there is a file of lines, and draw."""
    if arguments.plot is not None:
        plots.require_matplotlib("--plot", arguments.plot)
        check_new_file("--plot", arguments.plot)
    if not arguments.lines.exists():
        lines = _simulate(arguments)
        arguments.lines.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    lines = json.loads(arguments.lines.read_text(encoding="utf-8"))
    if arguments.plot is not None:
        _draw(lines, [point for path in arguments.measured for point in _points(path)], arguments.plot)


def _simulate(arguments: argparse.Namespace) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return for each load the lines, each of them pairs of a rate and the attainment."""
    if arguments.azure is None or arguments.mooncake is None:
        raise ConfigError(f"--lines: {arguments.lines} does not exist; to simulate it give --azure and --mooncake")
    steps = profiled_predictor(None if arguments.profile is None else load_profile(arguments.profile))
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for load, (rates, targets) in LOADS.items():
        path = {"azure": arguments.azure, "mooncake": arguments.mooncake}.get(load)
        source = WorkloadSource(
            trace=standard_trace(load) if path is None else load_trace(path),
            arrivals="trace",
            duration_s=_DURATION_S,
            max_input_len=32_768,
            max_output_len=512,
            vocab_size=32_000,
        )
        lines[load] = {name: [] for name in (*SYSTEMS, _BOUND)}
        for rate in rates:
            for name, system in SYSTEMS.items():
                setting = Setting(steps, steps, system.sizes({}, _KV_TOKENS), targets)
                outcome = simulate(system.system, setting, requests_of(source.workload(rate, 0)))
                lines[load][name].append((rate, outcome.attainment))
            lines[load][_BOUND].append((rate, outcome.bound))
            print(load, rate, {name: round(line[-1][1], 3) for name, line in lines[load].items()}, flush=True)
    return lines


def _points(path: Path) -> list[tuple[str, str, float, float]]:
    """Return load, line, rate and attainment of each measured run that belongs to a line.

    Others are left out: those with other targets than the line's.
    """
    found = []
    for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
        targets = LOADS[result["load"]][1] if result["load"] in LOADS else None
        if targets is None or abs(result["targets"]["ttft_ms"] / (targets.ttft_ms or 1.0) - 1) > _TOLERANCE:
            continue
        for name, system in SYSTEMS.items():
            if system.name == result["system"]:
                for run in result.get("runs", []):
                    summary: dict[str, Any] = run["summary"]
                    found.append((result["load"], name, summary["rate"], summary["attainment"]))
    return found


def _draw(
    lines: dict[str, dict[str, list[tuple[float, float]]]], points: list[tuple[str, str, float, float]], path: Path
) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, (load, of_load) in zip(axes.flat, lines.items(), strict=True):
        for name, line in of_load.items():
            color, style = dict(zip(SYSTEMS, _COLORS, strict=True)).get(name, "tab:gray"), "-"
            if name == _BOUND:
                style = ":"
            rates, shares = zip(*line, strict=True)
            axis.plot(rates, [100 * share for share in shares], style, color=color, label=name)
            measured = [point[2:] for point in points if point[:2] == (load, name)]
            axis.plot([rate for rate, _ in measured], [100 * share for _, share in measured], "o", color=color)
        targets = LOADS[load][1]
        axis.set(title=f"{load}: TTFT {targets.ttft_ms:.0f} ms, TPOT {targets.tpot_ms:.0f} ms", ylim=(0, 103))
        axis.grid(alpha=0.3)
    figure.supxlabel("requests per second")
    figure.supylabel("within both targets, %")
    axes.flat[0].plot([], [], "o", color="black", label="measured")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)

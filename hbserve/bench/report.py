"""How the benchmarks show their results: lines of tables, and the offline runs as JSON."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hbserve import __version__
from hbserve.bench.floor import Floor
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.run_record import Drafts, RunRecord
from hbserve.bench.serve_workload import ServeWorkload

_LIBRARIES = ("torch", "transformers", "numpy", "pyzmq", "msgspec", "flashinfer-python", "flash-attn")


def versions() -> dict[str, str]:
    """Return the versions of HBServe, Python, the operating system and the installed libraries."""
    found = {"hbserve": __version__, "python": platform.python_version(), "os": platform.platform()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def without_folders(value: Any) -> Any:
    """Return plain data with the names of files and folders in place of their absolute paths."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


# --- offline ---------------------------------------------------------------------------------------

RUN_HEADER = "run     seconds  prompt tok/s  output tok/s  total tok/s  TFLOP/s  of floor  preempted"
INSTANCE_HEADER = "run     instance          role        steps    busy   host ms"


@dataclass(frozen=True)
class Rates:
    """Rates of a run.

    Attributes:
        prompt_tok_s, output_tok_s, total_tok_s: tokens per second of the whole run.
        model_tflop_s: the floor's FLOPs, prefill and decode, per second, in 10^12.
        floor_share: the floor's time over the run's; 1 is the ideal schedule.
    """

    seconds: float
    prompt_tok_s: float
    output_tok_s: float
    total_tok_s: float
    model_tflop_s: float
    floor_share: float


def rates_of(runs: Sequence[RunRecord], floor: Floor) -> Rates:
    """Compute the rates of the runs' median time. All runs have the same numbers of tokens."""
    seconds = statistics.median(run.seconds for run in runs)
    num_in, num_out = runs[0].num_prompt_tokens, runs[0].num_output_tokens
    return Rates(
        seconds=seconds,
        prompt_tok_s=num_in / seconds,
        output_tok_s=num_out / seconds,
        total_tok_s=(num_in + num_out) / seconds,
        model_tflop_s=floor.flops / seconds / 1e12,
        floor_share=floor.seconds / seconds,
    )


def run_line(name: str, rates: Rates, preemptions: float) -> str:
    """Return a line under `RUN_HEADER`."""
    return (
        f"{name:<6}{rates.seconds:9.3f}{rates.prompt_tok_s:14.1f}{rates.output_tok_s:14.1f}"
        f"{rates.total_tok_s:13.1f}{rates.model_tflop_s:9.3f}{rates.floor_share:10.1%}{preemptions:11.0f}"
    )


def instance_lines(name: str, run: RunRecord) -> list[str]:
    """Return lines under `INSTANCE_HEADER`, one per instance."""
    return [
        f"{name:<8}{instance:<18}{work.role:<11}{work.steps:6}{work.busy_share:8.1%}{work.host_ms_per_step:10.3f}"
        for instance, work in run.instances.items()
    ]


def drafts_line(drafts: Drafts) -> str:
    """Return a line about what drafters of speculation did."""
    shares = [f"{name} {counts['accepted_tokens'] / counts['drafted_tokens']:.0%}" for name, counts in drafts.items()]
    num_right, num_drafts = (sum(counts[key] for counts in drafts.values()) for key in ("accepted_tokens", "drafts"))
    return f"{num_drafts} drafts, {num_right / num_drafts:.2f} tokens right of each ({', '.join(shares)} of all tried)"


def runs_as_json(runs: Sequence[RunRecord], floor: Floor) -> dict[str, Any]:
    """Return floor, raw runs and medians as plain data; field names as in the classes."""
    return {
        "floor": dataclasses.asdict(floor) | {"seconds": floor.seconds},
        "runs": [dataclasses.asdict(run) | dataclasses.asdict(rates_of([run], floor)) for run in runs],
        "median": dataclasses.asdict(rates_of(runs, floor))
        | {"preemptions": statistics.median(run.preemptions for run in runs)},
    }


# --- serving ---------------------------------------------------------------------------------------

_SERVE_HEADER = (
    "  rate/s  answered   met  goodput/s   in tok/s  out tok/s |   TTFT p50      p99 |  TPOT p50     p99 |"
    "   ITL p50     p99 |   E2E p50      p99"
)
_BUSY_CLIENT_SHARE = 0.8
_LATE_CLIENT_MS = 50.0


def show_setting(workload: ServeWorkload, lone: dict[str, float] | None, targets: RequestTargets | None) -> None:
    """Print the workload at the first rate, and the targets."""
    outputs = [request.output_len for request in workload.requests]
    print(
        f"workload  {len(workload.requests)} requests at {workload.rate:.2f}/s; prompts mean "
        f"{workload.mean_input_len} tokens, outputs mean {sum(outputs) / len(outputs):.0f}, longest {workload.longest}"
    )
    if lone is not None:
        print(
            f"alone     {lone['input_len']:.0f} tokens in: TTFT {lone['ttft_ms']:.1f} ms, TPOT {lone['tpot_ms']:.2f} ms"
        )
    if targets is not None:
        print(f"targets   {targets}")
    print(flush=True)


def show_run(summary: dict[str, Any], client: dict[str, float], is_first: bool) -> None:
    """Print a line for a run, latencies in ms, and a line for what went wrong in it."""
    if is_first:
        print(_SERVE_HEADER)
    met = f"{summary['attainment']:6.1%}" if "attainment" in summary else "     -"
    goodput = f"{summary['goodput_per_s']:9.2f}" if "goodput_per_s" in summary else "        -"
    cells = [
        f"{summary['offered_per_s']:8.2f} {summary['num_answered']:5d}/{summary['num_requests']:<4d}{met} {goodput}"
        f"  {summary['input_tokens_per_s']:9.0f}  {summary['output_tokens_per_s']:9.0f} "
    ]
    for name, width in (("ttft", 9), ("tpot", 8), ("itl", 8), ("e2e", 9)):
        spread = summary[f"{name}_ms"]
        numbers = (spread["p50"], spread["p99"]) if spread is not None else (math.nan, math.nan)
        cells.append(" " + " ".join(f"{number:{width}.1f}" for number in numbers) + " ")
    print("|".join(cells), flush=True)
    notes = [f"{count}x {error}" for error, count in summary["errors"].items()]
    if summary.get("drafts"):
        notes.append(drafts_line(summary["drafts"]))
    if summary["cut_short"]:
        notes.append("stopped early: the targets are missed")
    if client["cpu_share"] > _BUSY_CLIENT_SHARE:
        notes.append(f"the client used {client['cpu_share']:.0%} of its core and may be what was measured")
    if client["late_p99_ms"] > _LATE_CLIENT_MS:
        notes.append(f"the client sent late: p99 {client['late_p99_ms']:.0f} ms")
    if notes:
        print(f"          {'; '.join(notes)}", flush=True)


def show_best(best: float, worst: float) -> None:
    """Print the result of a sweep."""
    if best == 0:
        print(f"\nbest      no rate down to {worst:.3g}/s keeps the targets", flush=True)
    else:
        above = "no higher rate was tried" if math.isinf(worst) else f"{worst:.3f} do not"
        print(f"\nbest      {best:.3f} requests/s keep the targets; {above}", flush=True)

"""What the serving benchmark prints."""

from __future__ import annotations

import math
from typing import Any

from hbserve.bench.request_record import Targets
from hbserve.bench.serve_workload import ServeWorkload

_HEADER = (
    "  rate/s  answered   met  goodput/s   in tok/s  out tok/s |   TTFT p50      p99 |  TPOT p50     p99 |"
    "   ITL p50     p99 |   E2E p50      p99"
)
_BUSY_CLIENT_SHARE = 0.8
_LATE_CLIENT_MS = 50.0


def show_setting(workload: ServeWorkload, lone: dict[str, float] | None, targets: Targets | None) -> None:
    """The workload at the first rate, and the targets."""
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
    """One line for a run, and one for what was wrong with it. Latencies in ms."""
    if is_first:
        print(_HEADER)
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
    if summary["cut_short"]:
        notes.append("stopped early: the targets are missed")
    if client["cpu_share"] > _BUSY_CLIENT_SHARE:
        notes.append(f"the client used {client['cpu_share']:.0%} of its core and may be what was measured")
    if client["late_p99_ms"] > _LATE_CLIENT_MS:
        notes.append(f"the client sent late: p99 {client['late_p99_ms']:.0f} ms")
    if notes:
        print(f"          {'; '.join(notes)}", flush=True)


def show_best(best: float, worst: float) -> None:
    """What a sweep found."""
    if best == 0:
        print(f"\nbest      no rate down to {worst:.3g}/s keeps the targets", flush=True)
    else:
        above = "nothing higher was tried" if math.isinf(worst) else f"{worst:.3f} do not"
        print(f"\nbest      {best:.3f} requests/s keep the targets; {above}", flush=True)

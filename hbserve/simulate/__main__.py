"""``python -m hbserve.simulate``: which system serves a load within its targets, without a GPU.

It compares systems at a rate, finds the highest rate of each, or the cheapest system for a rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hbserve.bench.arguments import (
    add_load_arguments,
    check_new_file,
    natural,
    positive,
    positive_float,
    run_command,
    share,
)
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import load_trace
from hbserve.config import SchedulerConfig
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.simulate.config import Sizes
from hbserve.simulate.misses import Miss
from hbserve.simulate.planning import merge_plans, plan
from hbserve.simulate.requests import requests_of
from hbserve.simulate.systems import (
    ANY_RATIO,
    FORMS,
    Setting,
    SimulatedOutcome,
    System,
    find_highest_rate,
    simulate,
)

DEFAULT_SYSTEMS = ("unified", "unified@512", "semi_pd@80-50", "semi_pd@100-100", "slo@80-50")
_HEADER = (
    f"{'system':20} {'GPUs':>4} {'req/s':>7} {'attained':>8} {'of bound':>8} {'good/s':>7} {'per GPU':>7} "
    f"{'TTFT p50':>8} {'p90':>7} {'p99':>7} {'TPOT p50':>8} {'p90':>6} {'p99':>6} {'moves':>5} {'cached':>6}"
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.simulate") -> int:
    """Parse the arguments and run; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--rate", type=positive_float, metavar="PER_S", help="requests per second (default: the trace's)"
    )
    question.add_argument("--sweep", action="store_true", help="find each system's highest rate")
    question.add_argument("--plan", type=positive_float, metavar="PER_S", help="find the cheapest system for this rate")
    add_system_arguments(parser)
    return run_command(run, parser.parse_args(arguments))


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the systems, their targets and their load; the caller declares ``rate``, ``sweep`` and ``plan``."""
    parser.add_argument(
        "--system",
        action="append",
        metavar="SYSTEM",
        help=f"{FORMS}; may be repeated (default: {', '.join(DEFAULT_SYSTEMS)}, and 1p1d or with --plan {ANY_RATIO})",
    )
    parser.add_argument("--goodput", required=True, metavar="TARGETS", help="ttft:500,tpot:50 (milliseconds)")
    parser.add_argument("--attainment", type=float, default=0.9, help="share of requests that keep them (default: 0.9)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="step times (default: built in, 8B on an H200)")
    parser.add_argument("--no-priority", action="store_true", help="prefill at the same priority as decode")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Azure .csv or Mooncake .jsonl")
    add_load_arguments(parser)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--chunk-size", type=positive, metavar="N", help="max tokens of a prompt in a step")
    parser.add_argument("--max-chunk-prefill-tokens", type=positive, metavar="N", help="of all prompts in a step")
    parser.add_argument(
        "--policy",
        choices=["slo_aware", "fcfs", "shortest_prompt_first"],
        default="slo_aware",
        help="order of the queue",
    )
    parser.add_argument("--max-num-seqs", type=positive, default=256)
    parser.add_argument("--kv-tokens", type=positive, default=800_000, help="tokens that a KV pool holds")
    parser.add_argument(
        "--host-tokens",
        type=positive,
        metavar="N",
        help="each system also with a tier in the host's memory that holds N tokens (kv_cache.host_bytes)",
    )
    parser.add_argument(
        "--acceptance",
        type=share,
        metavar="SHARE",
        help="each system also with drafts, of whose tokens so many are right (speculation)",
    )
    parser.add_argument("--misses", action="store_true", help="say which target was missed and why (with --rate)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to this file")


def run(arguments: argparse.Namespace) -> None:
    """Simulate, print a table, write the JSON file.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    check_new_file("--json", arguments.json)
    if not 0 < arguments.attainment < 1:
        raise ConfigError(f"--attainment: must be in (0, 1), got {arguments.attainment}")
    if arguments.misses and (arguments.sweep or arguments.plan is not None):
        raise ConfigError("--misses: it is for one rate, not for a search")
    names = arguments.system or [*DEFAULT_SYSTEMS, "1p1d" if arguments.plan is None else ANY_RATIO]
    if ANY_RATIO in names and arguments.plan is None:
        raise ConfigError(f"--system: {ANY_RATIO} is for --plan; name a ratio, such as 2p1d")
    systems = [System.parse(name) for name in names]
    settings, source = _settings(arguments), _source(arguments)
    setting = settings[0]
    assert setting.steps.curves is not None
    profile = setting.steps.curves.profile
    print(
        f"targets {setting.targets} for {100 * setting.attainment:g} % of requests; {profile.model} on "
        f"{profile.device}\n\n{_HEADER}",
        flush=True,
    )
    outcomes = []
    for outcome in _outcomes(arguments, systems, settings, source):
        outcomes.append(outcome)
        print(_row(outcome), flush=True)
        if outcome.misses is not None:
            print(_missed(outcome.misses), flush=True)
    if arguments.plan is not None and not outcomes:
        raise ConfigError("--plan: none of the systems keeps these targets at any rate")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")


def _outcomes(
    arguments: argparse.Namespace, systems: list[System], settings: list[Setting], source: WorkloadSource
) -> Iterator[SimulatedOutcome]:
    if arguments.plan is not None:
        plans = [plan(systems, setting, source, arguments.seed, arguments.plan) for setting in settings]
        yield from (outcome for _, outcome in merge_plans(plans))
        return
    for system, setting in itertools.product(systems, settings):
        if not arguments.sweep:
            requests = requests_of(source.workload(arguments.rate, arguments.seed))
            if requests[0].arrival == requests[-1].arrival:
                raise ConfigError("all requests come at once, so there is no rate to judge; take more, or a --rate")
            yield simulate(system, setting, requests, records_misses=arguments.misses)
        elif (best := find_highest_rate(system, setting, source, arguments.seed)) is not None:
            yield best
        else:
            print(f"{setting.name_of(system):20} keeps the targets at no rate", flush=True)


def _missed(misses: list[Miss]) -> str:
    """Return one line of counts for each target."""
    lines = []
    for target in ("TTFT", "TPOT"):
        reasons = Counter(miss.reason for miss in misses if miss.target == target)
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        lines.append(f"    missed {target}: {counts or 'none'}")
    return "\n".join(lines)


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    """Return the plain setting and, if they are asked for, one with a tier in the host's memory and one with drafts."""
    profile = None if arguments.profile is None else load_profile(arguments.profile)
    steps = profiled_predictor(profile, priority=not arguments.no_priority)
    sizes = Sizes(
        chunk_size=arguments.chunk_size,
        max_chunk_prefill_tokens=arguments.max_chunk_prefill_tokens,
        max_num_seqs=arguments.max_num_seqs,
        kv_tokens=arguments.kv_tokens,
        scheduler=SchedulerConfig(policy=arguments.policy),
    )
    setting = Setting(steps, steps, sizes, RequestTargets.parse(arguments.goodput), arguments.attainment)
    others = [{"host_tokens": arguments.host_tokens}, {"acceptance": arguments.acceptance}]
    others = [other for other in others if None not in other.values()]
    return [setting, *(dataclasses.replace(setting, sizes=dataclasses.replace(sizes, **other)) for other in others)]


def _source(arguments: argparse.Namespace) -> WorkloadSource:
    trace = None if arguments.trace is None else load_trace(arguments.trace)
    duration_s = arguments.duration
    if (
        duration_s is None
        and arguments.num_requests is None
        and (trace is None or arguments.sweep or arguments.plan is not None)
    ):
        duration_s = 120.0
    return WorkloadSource(
        trace=trace,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        arrivals="poisson" if trace is None else "trace",
        duration_s=duration_s,
        num_requests=arguments.num_requests,
        max_input_len=arguments.max_input_len,
        vocab_size=32_000,
    )


def _row(outcome: SimulatedOutcome) -> str:
    return (
        f"{outcome.system:20} {outcome.num_gpus:4} {outcome.rate:7.2f} {outcome.attainment:8.3f} "
        f"{outcome.share_of_bound:8.3f} "
        f"{outcome.goodput:7.2f} {outcome.goodput / outcome.num_gpus:7.2f} "
        f"{outcome.ttft_p50_ms:8.0f} {outcome.ttft_p90_ms:7.0f} {outcome.ttft_p99_ms:7.0f} "
        f"{outcome.tpot_p50_ms:8.1f} {outcome.tpot_p90_ms:6.1f} {outcome.tpot_p99_ms:6.1f} {outcome.moves:5} "
        f"{outcome.cached_share:6.1%}{_tier(outcome)}"
    )


def _tier(outcome: SimulatedOutcome) -> str:
    """Say what a tier has copied."""
    if not outcome.stored_bytes:
        return ""
    return f"  loaded {outcome.loaded_bytes / 1e9:.1f} GB, stored {outcome.stored_bytes / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())

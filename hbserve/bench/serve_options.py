"""Options of the serving benchmark, and the command line arguments that they are read from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbserve import Config, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    add_load_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    given_arguments,
    make_config,
    natural,
    positive,
    positive_float,
    share,
)
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.sweep import RateSearch
from hbserve.bench.traces import load_trace
from hbserve.config import load
from hbserve.errors import ConfigError
from hbserve.model_spec import ModelSpec
from hbserve.tokenizer import Tokenizer

ALL_TARGETS = ("ttft_ms", "tpot_ms")
"""Targets that a request can send to the server."""


@dataclass(frozen=True)
class SloScale:
    """Targets as multiples of a lone request's latencies."""

    ttft: float
    tpot: float

    @staticmethod
    def parse(text: str) -> SloScale:
        """Read ``7.5``, or ``7.5:10`` for TTFT and TPOT apart.

        Raises:
            ConfigError: if it is neither.
        """
        ttft, _, tpot = text.partition(":")
        try:
            scale = SloScale(float(ttft), float(tpot or ttft))
        except ValueError:
            scale = SloScale(0, 0)
        if not (1 <= scale.ttft < 1e6 and 1 <= scale.tpot < 1e6):
            raise ConfigError(f"--slo-scale: {text!r} is not like 7.5 or 7.5:10, at least 1")
        return scale


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a run or a sweep.

    Attributes:
        url: address of a server; None: an engine of ``config`` is started.
        model: its name at the URL.
        rate: requests per second; in a sweep the first rate. None: the trace's.
        sweep: find the highest rate at which ``attainment`` of the requests keep their targets.
        precision: the sweep ends when the rate is known within this factor.
        sweep_factor: factor between the sweep's rates before one is too high and one is not.
        give_up_below: a run of a sweep stops as soon as it cannot reach this; None: ``attainment``.
        max_runs: limit of a sweep's runs.
        rates: the rates of a sweep that does not search; see `GivenRates`.
        time_limit_s: the sweep starts no run after this time.
        told_targets: names of the targets that each request sends to the server.
        timeout_s: limit of one request.
        command: the arguments as text, for the results file.
    """

    source: WorkloadSource
    seed: int
    sampling: SamplingParams
    attainment: float
    precision: float
    timeout_s: float
    url: str | None = None
    config: Config | None = None
    model: str | None = None
    rate: float | None = None
    targets: RequestTargets | None = None
    slo_scale: SloScale | None = None
    told_targets: tuple[str, ...] = ()
    sweep: bool = False
    time_limit_s: float | None = None
    sweep_factor: float = 2.0
    give_up_below: float | None = None
    max_runs: int = RateSearch.MAX_RUNS
    rates: tuple[float, ...] = ()
    show_progress: bool = False
    json: Path | None = None
    plots: Path | None = None
    command: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_arguments(arguments: argparse.Namespace) -> ServeOptions:
        """Read what `add_arguments` has declared.

        Raises:
            HBServeError: naming the argument that cannot be honoured.
        """
        config = None
        if arguments.url is not None:
            if arguments.config is not None or given_arguments(arguments):
                raise ConfigError("--url: that server has its own configuration; leave --config and engine options out")
            if arguments.vocab_size is None and arguments.tokenizer is None:
                raise ConfigError("--url needs --vocab-size or --tokenizer: prompts are token ids below it")
        else:
            config = _engine_config(arguments)
        targets = None if arguments.goodput is None else RequestTargets.parse(arguments.goodput)
        slo_scale = None if arguments.slo_scale is None else SloScale.parse(arguments.slo_scale)
        if targets is not None and slo_scale is not None:
            raise ConfigError("--goodput and --slo-scale both set the targets; give one")
        if arguments.sweep and targets is None and slo_scale is None:
            raise ConfigError("--sweep needs targets: --goodput or --slo-scale")
        if arguments.sweep and arguments.duration is None and arguments.num_requests is None:
            raise ConfigError("--sweep needs --duration or --num-requests for each of its runs")
        check_new_file("--json", arguments.json)
        check_new_file("--plots", arguments.plots)
        return ServeOptions(
            url=arguments.url,
            config=config,
            model=arguments.model,
            source=_source(arguments, config),
            seed=arguments.seed,
            sampling=SamplingParams(temperature=arguments.temperature, seed=arguments.seed, ignore_eos=True),
            rate=arguments.rate,
            targets=targets,
            slo_scale=slo_scale,
            told_targets=ALL_TARGETS if arguments.tell_targets else (),
            sweep=arguments.sweep,
            attainment=arguments.attainment,
            precision=arguments.precision,
            time_limit_s=arguments.time_limit,
            timeout_s=arguments.timeout,
            show_progress=not arguments.no_progress,
            json=arguments.json,
            plots=arguments.plots,
            command={name: str(value) for name, value in vars(arguments).items() if value not in (None, False, [])},
        )


def _engine_config(arguments: argparse.Namespace) -> Config:
    if arguments.config is not None:
        if arguments.model is not None or given_arguments(arguments):
            raise ConfigError("--config: the file has all options; leave --model and engine options out")
        return load(arguments.config)
    if arguments.model is None:
        raise ConfigError("--url, --config or --model is needed: it names the system to measure")
    model = find_model(arguments.model)
    return make_config(model, engine_arguments(arguments, model)).freeze()


def _source(arguments: argparse.Namespace, config: Config | None) -> WorkloadSource:
    tokenizer_path = arguments.tokenizer or (config.tokenizer_path if config is not None else None)
    vocab_size = arguments.vocab_size
    if vocab_size is None:
        vocab_size = ModelSpec.load(Path(arguments.tokenizer if config is None else config.model.path)).vocab_size
    trace = None
    if arguments.trace is not None:
        encode = None
        if tokenizer_path is not None and arguments.trace.suffix == ".json":
            encode = Tokenizer(str(tokenizer_path), str(tokenizer_path)).encode
        trace = load_trace(arguments.trace, encode)
    has_times = trace is not None and trace[0].arrival_s is not None
    arrivals = arguments.arrivals or ("trace" if has_times else "poisson")
    if arrivals == "trace" and not has_times:
        raise ConfigError("--arrivals trace: there is no trace with times")
    burstiness = {"poisson": 1.0, "trace": 1.0, "gamma": arguments.burstiness}[arrivals]
    return WorkloadSource(
        trace=trace,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        arrivals=arrivals,
        burstiness=burstiness,
        duration_s=arguments.duration,
        num_requests=arguments.num_requests,
        max_input_len=arguments.max_input_len,
        max_output_len=arguments.max_output_len,
        vocab_size=vocab_size,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `ServeOptions.from_arguments`."""
    target = parser.add_argument_group("target", "one of --url, --config, --model")
    target.add_argument(
        "--url", help="an OpenAI-compatible server, such as http://127.0.0.1:8000 (HBSERVE_API_KEY is its key)"
    )
    target.add_argument("--config", type=Path, metavar="FILE", help="start this system here and drive it without HTTP")
    target.add_argument("--model", help="with --url: its name there; else a folder or shape to start an engine of")
    target.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="model folder, for the vocabulary and text")
    target.add_argument("--vocab-size", type=positive, metavar="N", help="token ids of prompts are below it")

    load = parser.add_argument_group("load")
    load.add_argument("--trace", type=Path, metavar="FILE", help="Azure .csv, Mooncake .jsonl or ShareGPT .json")
    load.add_argument("--rate", type=positive_float, metavar="PER_S", help="requests per second (default: the trace's)")
    load.add_argument(
        "--arrivals",
        choices=["trace", "poisson", "gamma"],
        help="trace: its times, stretched to the rate (default where it has times); else drawn (default: poisson)",
    )
    load.add_argument(
        "--burstiness", type=positive_float, default=4.0, help="of gamma: variance of the gaps over mean² (default: 4)"
    )
    add_load_arguments(load)
    load.add_argument("--max-output-len", type=positive, metavar="TOKENS", help="cut longer outputs to this")
    load.add_argument("--seed", type=natural, default=0, help="of arrivals, lengths, tokens and sampling (default: 0)")
    load.add_argument("--temperature", type=float, default=0.0, help="of the sampling (default: 0)")
    load.add_argument("--timeout", type=positive_float, default=600.0, metavar="S", help="of a request (default: 600)")

    slo = parser.add_argument_group("targets")
    slo.add_argument("--goodput", metavar="TARGETS", help="ttft:500,tpot:50 (milliseconds; also e2e)")
    slo.add_argument(
        "--slo-scale", metavar="X[:Y]", help="TTFT and TPOT at X times (TPOT at Y) of a lone request's, measured"
    )
    slo.add_argument("--tell-targets", action="store_true", help="send targets with each request (ttft_ms, tpot_ms)")
    slo.add_argument("--sweep", action="store_true", help="find the highest rate that keeps the targets")
    slo.add_argument(
        "--attainment", type=share, default=0.9, help="share of requests that must keep them (default: 0.9)"
    )
    slo.add_argument("--precision", type=share, default=0.05, help="of the rate a sweep finds (default: 0.05)")
    slo.add_argument("--time-limit", type=positive_float, metavar="S", help="a sweep starts no run after this")

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all results, with a record per request")
    output.add_argument("--plots", type=Path, metavar="FOLDER", help="PNG files; needs matplotlib")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_engine_arguments(parser)

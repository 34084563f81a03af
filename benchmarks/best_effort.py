"""Best-effort requests beside requests with targets: what they cost the others, and what they get.

    python -m benchmarks best_effort --model qwen3-8b --trace azure.csv --rate 20 --slo-scale 7.5:10 --json out.json

One system of mode ``unified`` serves the trace alone, then the same requests beside a backlog of best-effort requests,
then the backlog alone for a few seconds. *busy* is the share of the arrivals' time in which the worker computed steps.
The file is written after each of the three.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hbserve import DisaggregatedLLM, SamplingParams
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
from hbserve.bench.target import EngineTarget
from hbserve.bench.traces import load_trace

_MAX_ALONE_S = 6.0
_HEADER = f"{'':20} {'attained':>8} {'TTFT p50':>8} {'p90':>7} {'TPOT p50':>8} {'batch tokens/s':>14} {'busy':>5}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="folder, or a shape under configs/models")
    parser.add_argument("--trace", required=True, type=Path, metavar="FILE", help="of the requests with targets")
    parser.add_argument("--rate", required=True, type=positive_float, metavar="PER_S", help="of these")
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument("--slo-scale", metavar="X[:Y]", help="targets: times a lone request's, measured")
    targets.add_argument("--goodput", metavar="TARGETS", help="targets, as ttft:500,tpot:50 (milliseconds)")
    parser.add_argument("--duration", type=float, default=20.0, metavar="S", help="of the arrivals (default: 20)")
    parser.add_argument("--max-input-len", type=positive, metavar="TOKENS", help="longer prompts are cut to this")
    parser.add_argument("--max-output-len", type=positive, metavar="TOKENS", help="cut longer outputs to this")
    parser.add_argument("--backlog", type=positive, default=256, metavar="N", help="open best-effort requests")
    parser.add_argument("--batch-lengths", type=positive, nargs=2, default=(1000, 300), metavar="TOKENS")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write the JSON file."""
    check_new_file("--json", arguments.json)
    asyncio.run(_measure(arguments))


class Backlog:
    """Best-effort requests that follow each other, so many open at once.

    Attributes:
        num_tokens: output tokens so far.
    """

    def __init__(self, target: EngineTarget, input_len: int, output_len: int) -> None:
        self._target, self._input_len, self._output_len = target, input_len, output_len
        self._number = 0
        self.num_tokens = 0

    @asynccontextmanager
    async def keep_open(self, num_requests: int) -> AsyncIterator[None]:
        """Have so many requests open while the body runs; those left are cancelled at its end."""
        tasks = [asyncio.create_task(self._send_each()) for _ in range(num_requests)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_each(self) -> None:
        while True:
            self._number += 1
            size = self._target.vocab_size
            prompt = [(self._number * 7919 + 31 * index) % (size - 100) + 50 for index in range(self._input_len)]
            async for count in self._target.generate(prompt, self._output_len, {}):
                self.num_tokens += count


async def _measure(arguments: argparse.Namespace) -> None:
    folder = find_model(arguments.model)
    config = make_config(folder, engine_arguments(arguments, folder) | {"mode": "unified"})
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    results: dict[str, Any] = {}
    document = {"rate": arguments.rate, "trace": arguments.trace.stem, "versions": versions(), "results": results}
    async with DisaggregatedLLM(config.freeze()) as llm:
        target = EngineTarget(llm, sampling)
        batch = EngineTarget(llm, SamplingParams(temperature=0, ignore_eos=True, priority="batch"))
        options = _options(arguments, target.vocab_size)
        if arguments.goodput is not None:
            targets = RequestTargets.parse(arguments.goodput)
        else:
            targets = await ServeBenchmark(target, options).measure_targets(SloScale.parse(arguments.slo_scale))
        document["targets"] = dataclasses.asdict(targets)
        options = dataclasses.replace(options, targets=targets)
        backlog = Backlog(batch, *arguments.batch_lengths)
        print(_HEADER, flush=True)
        for seed, (name, num_open) in enumerate((("alone", 0), ("beside best-effort", arguments.backlog))):
            async with backlog.keep_open(num_open):
                started, before = time.monotonic(), backlog.num_tokens
                busy = asyncio.create_task(_busy_share(target, arguments.duration))
                measured = await ServeBenchmark(target, dataclasses.replace(options, seed=seed)).run()
                seconds, tokens = time.monotonic() - started, backlog.num_tokens - before
            results[name] = measured["runs"][0] | {"batch_tokens_per_s": tokens / seconds, "busy_share": await busy}
            _save_and_show(arguments.json, document, name)
        async with backlog.keep_open(arguments.backlog):
            before = backlog.num_tokens
            await asyncio.sleep(_MAX_ALONE_S)
            results["best-effort alone"] = {"batch_tokens_per_s": (backlog.num_tokens - before) / _MAX_ALONE_S}
        _save_and_show(arguments.json, document, "best-effort alone")


def _options(arguments: argparse.Namespace, vocab_size: int) -> ServeOptions:
    source = WorkloadSource(
        trace=load_trace(arguments.trace),
        arrivals="trace",
        duration_s=arguments.duration,
        max_input_len=arguments.max_input_len,
        max_output_len=arguments.max_output_len,
        vocab_size=vocab_size,
    )
    return ServeOptions(
        source=source,
        seed=0,
        sampling=SamplingParams(),
        attainment=0.9,
        precision=0.05,
        timeout_s=60.0,
        rate=arguments.rate,
        told_targets=ALL_TARGETS,
    )


async def _busy_share(target: EngineTarget, duration_s: float) -> float:
    """Measure the share of the time, from now on, in which the busiest instance computed steps."""
    before, started = await _busy_s(target), time.monotonic()
    await asyncio.sleep(duration_s)
    after, seconds = await _busy_s(target), time.monotonic() - started
    return max(after[name] - before[name] for name in after) / seconds


async def _busy_s(target: EngineTarget) -> dict[str, float]:
    instances = (await target.describe())["stats"]["gpu_instances"]
    return {name: float(instance["busy_s"]) for name, instance in instances.items()}


def _save_and_show(path: Path, document: dict[str, Any], name: str) -> None:
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    result = document["results"][name]
    tokens = f"{result['batch_tokens_per_s']:14.0f}"
    if "summary" not in result:
        print(f"{name:20} {'':8} {'':8} {'':7} {'':8} {tokens}", flush=True)
        return
    summary = result["summary"]
    print(
        f"{name:20} {summary['attainment']:8.1%} {summary['ttft_ms']['p50']:8.1f} {summary['ttft_ms']['p90']:7.1f} "
        f"{summary['tpot_ms']['p50']:8.1f} {tokens} {result['busy_share']:5.2f}",
        flush=True,
    )

"""The serving benchmark: one run at a rate, or a search for the highest rate that keeps the targets.

The client, this process, sends the load from one event loop. The system runs in processes of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import UTC, datetime
from typing import Any

import msgspec
from tqdm import tqdm

from hbserve.bench import plots, report
from hbserve.bench.load import LoadResult, LoadRun
from hbserve.bench.request_record import RequestTargets, summarize
from hbserve.bench.run_record import drafts_between
from hbserve.bench.serve_options import ServeOptions, SloScale
from hbserve.bench.serve_workload import ServeWorkload
from hbserve.bench.sweep import GivenRates, RateSearch, interpolated_rate
from hbserve.bench.target import LoadTarget, TargetError, connect_to_server, start_engine
from hbserve.errors import ConfigError, RequestFailedError

_LONE_REQUESTS = 5
_LONE_OUTPUT_LEN = 64
_SETTLE_S = 60.0
_lone_prompts = itertools.count(1 << 29)
"""Seeds of prompts outside of the runs. No two are equal: a target that serves several loads would have one cached."""


def run(options: ServeOptions) -> None:
    """Run what the options ask for; print tables, write the JSON file and the plots.

    Raises:
        HBServeError: if the target fails; `ConfigError` for options that cannot be run.
    """
    if options.plots is not None:
        plots.require_matplotlib("--plots")
    document = asyncio.run(_run(options))
    if options.json is not None:
        # JSON has no infinity, which is the rate of requests that come at once; msgspec writes null for it.
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
        print(f"\nwritten   {options.json}")
    if options.plots is not None:
        for path in plots.draw(document, options.plots):
            print(f"written   {path}")


async def _run(options: ServeOptions) -> dict[str, Any]:
    async with _target(options) as target:
        return await ServeBenchmark(target, options).run()


def _target(options: ServeOptions) -> AbstractAsyncContextManager[LoadTarget]:
    if options.config is not None:
        return start_engine(options.config, options.sampling)
    assert options.url is not None
    sampling = {"temperature": options.sampling.temperature, "seed": options.seed, "ignore_eos": True}
    return connect_to_server(options.url, options.model, options.source.vocab_size, sampling, options.timeout_s)


class ServeBenchmark:
    """Runs on a connected target.

    Args:
        options: its fields about the target are not used.
        before_run: awaited before each run.
    """

    def __init__(
        self, target: LoadTarget, options: ServeOptions, before_run: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._target, self._options, self._before_run = target, options, before_run
        self._targets = options.targets
        self._runs: list[dict[str, Any]] = []

    async def run(self) -> dict[str, Any]:
        """Measure; return the results as plain data.

        Raises:
            ConfigError: if the workload does not fit the target.
            RequestFailedError: if the target does not answer a lone request.
        """
        options = self._options
        start = datetime.now(UTC)
        workload = options.source.workload(options.rate, options.seed)
        self._check(workload)
        await self._warm_up(workload)
        lone = None
        if options.slo_scale is not None:
            lone = await self._measure_alone(workload)
            self._targets = _scaled(lone, options.slo_scale)
        report.show_setting(workload, lone, self._targets)
        best = await self._sweep(workload) if options.sweep else None
        if not options.sweep:
            await self._measure(options.rate, None)
        return {
            "started": start.isoformat(timespec="seconds"),
            "options": options.command,
            "versions": report.versions(),
            "target": await self._target.describe(),
            "lone_request": lone,
            "targets": None if self._targets is None else msgspec.to_builtins(self._targets),
            "best_rate": best,
            "runs": self._runs,
        }

    async def measure_targets(self, scale: SloScale) -> RequestTargets:
        """Measure a lone request of the workload; return its latencies times the scale."""
        workload = self._options.source.workload(self._options.rate, self._options.seed)
        await self._warm_up(workload)
        return _scaled(await self._measure_alone(workload), scale)

    def _check(self, workload: ServeWorkload) -> None:
        limit = self._target.max_model_len
        if limit is not None and workload.longest > limit:
            raise ConfigError(
                f"the longest request has {workload.longest} tokens, prompt and output; the target takes {limit}. "
                "Cut with --max-input-len and --max-output-len"
            )

    async def _warm_up(self, workload: ServeWorkload) -> None:
        """Send a short, a mean and a long request, so that no measured one pays for first-time work."""
        longest = max(request.input_len for request in workload.requests)
        for length in (16, workload.mean_input_len, longest):
            await self._alone(workload.draw_tokens(next(_lone_prompts), length), 4)

    async def _measure_alone(self, workload: ServeWorkload) -> dict[str, float]:
        """Measure requests of the workload's mean prompt length, one at a time; return medians."""
        ttfts, tpots = [], []
        for _ in range(_LONE_REQUESTS):
            prompt = workload.draw_tokens(next(_lone_prompts), workload.mean_input_len)
            times = await self._alone(prompt, _LONE_OUTPUT_LEN)
            ttfts.append(times[0])
            tpots.append((times[-1] - times[0]) / (_LONE_OUTPUT_LEN - 1))
        return {
            "input_len": workload.mean_input_len,
            "output_len": _LONE_OUTPUT_LEN,
            "ttft_ms": statistics.median(ttfts) * 1000,
            "tpot_ms": statistics.median(tpots) * 1000,
        }

    async def _alone(self, prompt: list[int], output_len: int) -> list[float]:
        """Send one request; return the seconds after which its tokens came."""
        start = time.perf_counter()
        times: list[float] = []
        try:
            async with aclosing(self._target.generate(prompt, output_len, {})) as arrivals:
                async for count in arrivals:
                    times += [time.perf_counter() - start] * count
        except TargetError as error:
            raise RequestFailedError(f"the target does not answer a lone request: {error}") from error
        if len(times) < output_len:
            raise RequestFailedError(f"the target gave {len(times)} of {output_len} tokens; does it know ignore_eos?")
        return times

    async def _sweep(self, workload: ServeWorkload) -> dict[str, float | None]:
        options = self._options
        assert self._targets is not None
        started = time.monotonic()
        first_rate = options.rate or workload.rate
        if not math.isfinite(first_rate):
            raise ConfigError("--sweep: the requests come at once, so a first rate is needed: --rate")
        searched = first_rate, options.precision, options.sweep_factor, options.max_runs
        search = GivenRates(options.rates) if options.rates else RateSearch(*searched)
        give_up_below = options.attainment if options.give_up_below is None else options.give_up_below
        reached = []
        while (rate := search.next_rate()) is not None:
            if options.time_limit_s is not None and time.monotonic() - started > options.time_limit_s:
                break
            summary = await self._measure(rate, give_up_below)
            attainment = summary["attainment"]
            is_far = summary["cut_short"] if options.give_up_below is not None else False
            search.add(rate, attainment >= options.attainment, is_far)
            reached.append((rate, give_up_below if summary["cut_short"] else attainment))
        report.show_best(search.best, search.worst)
        return {
            "rate": search.best,
            "too_high": search.worst if math.isfinite(search.worst) else 0.0,
            "interpolated": interpolated_rate(reached, options.attainment),
        }

    async def _measure(self, rate: float | None, attainment: float | None) -> dict[str, Any]:
        """Measure one run; return its summary.

        Args:
            attainment: stop as soon as this share cannot be reached any more; None: run to the end.
        """
        options, seed = self._options, self._options.seed + len(self._runs)
        workload = options.source.workload(rate, seed)  # other prompts each time: the prefix cache has none
        if self._before_run is not None:
            await self._before_run()
        drafts_before = await self._target.drafts()
        num_requests = len(workload.requests)
        max_missed = None if attainment is None else math.floor((1 - attainment) * num_requests + 1e-9)
        with tqdm(
            total=num_requests,
            desc=f"{workload.rate:8.2f} requests/s",
            unit="req",
            disable=not options.show_progress,
            file=sys.stderr,
            leave=False,
        ) as bar:
            load = LoadRun(
                self._target,
                workload,
                self._targets,
                options.told_targets,
                max_missed,
                options.timeout_s,
                lambda record: bar.update(),
            )
            result = await load.run()
        summary = summarize(result.records, self._targets) | {
            "rate": workload.rate if rate is None else rate,
            "offered_per_s": workload.rate,
            "seed": seed,
            "cut_short": result.cut_short,
            "drafts": drafts_between(drafts_before, await self._target.drafts()),
        }
        self._runs.append(_as_dict(result, summary))
        report.show_run(summary, self._runs[-1]["client"], is_first=len(self._runs) == 1)
        # When this request is answered, the target has dropped the requests that were cut off.
        await asyncio.wait_for(self._alone(workload.draw_tokens(1 << 28, 16), 1), _SETTLE_S)
        return summary


def _as_dict(result: LoadResult, summary: dict[str, Any]) -> dict[str, Any]:
    gaps = sorted(gap * 1000 for record in result.records for gap in record.itls_s)
    step = max(1, len(gaps) // 500)
    return {
        "summary": summary,
        "client": result.client.as_dict(result.records),
        "split": result.split,
        "itl_quantiles_ms": [round(gap, 3) for gap in gaps[::step]],
        "requests": [record.as_dict() for record in result.records],
    }


def _scaled(lone: dict[str, float], scale: SloScale) -> RequestTargets:
    return RequestTargets(ttft_ms=lone["ttft_ms"] * scale.ttft, tpot_ms=lone["tpot_ms"] * scale.tpot)

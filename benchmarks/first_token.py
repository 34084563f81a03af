"""Where a request's time to its first token goes, hop by hop, and how the steps of that time compare with a profile.

    python -m benchmarks first_token --model qwen3-8b --trace azure.csv --rate 24 --duration 20 --json out.json
    python -m benchmarks first_token ... --http

One system of mode ``unified`` serves the trace: in this process, or behind its HTTP server. The scheduler writes a log
of its messages (`benchmarks.step_log`); this program joins it with the times at the client. The hops add up to TTFT:

    late      the client sends the request after it is due
    in        client, HTTP, text process, until the scheduler takes the request
    plan      until a step with its first chunk is planned
    before    that step waits for the one before, which runs
    travel    that step's plan and result travel, and the device waits
    steps     the device computes its chunks
    turns     between its chunks
    out       the result is taken, until the client has the token
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.step_log import FILE_VARIABLE, Core, Done, Entry, Key, Planned, Taken, key_of, read_log
from hbserve import SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    make_config,
    positive,
    positive_float,
)
from hbserve.bench.load import LoadRun
from hbserve.bench.report import versions
from hbserve.bench.request_record import RequestRecord, RequestTargets, percentile, summarize
from hbserve.bench.serve_options import ALL_TARGETS
from hbserve.bench.serve_workload import ServeWorkload, WorkloadSource
from hbserve.bench.target import LoadTarget, connect_to_server, start_engine
from hbserve.bench.traces import load_trace
from hbserve.errors import ConfigError
from hbserve.model_spec import ModelSpec
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork

_SCHEDULER = "benchmarks.step_log:RecordingScheduler"
_START_S, _END_S = 300.0, 20.0
_SETTLE_S = 1.0
"""Time before and after a run; the scheduler writes its log meanwhile."""
_TIMEOUT_S = 120.0
_WARM_UP_TOKENS = (16, 256, 1024)
HOPS = ("late", "in", "plan", "before", "travel", "steps", "turns", "out")
_SHOWN = (50, 90, 99)
_SIZES = (0, 1, 129, 257, 385, 513, 726, 1025, 1537, 2049)
"""Least prompt tokens of each kind of step in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="folder, or a shape under configs/models")
    parser.add_argument("--trace", required=True, type=Path, metavar="FILE")
    parser.add_argument("--rate", required=True, type=positive_float, action="append", metavar="PER_S")
    parser.add_argument("--duration", type=positive_float, default=20.0, metavar="S", help="of the arrivals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--goodput", type=RequestTargets.parse, help="targets that each request carries: ttft:172,tpot:43"
    )
    parser.add_argument("--max-input-len", type=positive, metavar="TOKENS", help="longer prompts are cut to this")
    parser.add_argument("--max-output-len", type=positive, metavar="TOKENS", help="cut longer outputs to this")
    parser.add_argument("--http", action="store_true", help="through the HTTP server, which is started here")
    parser.add_argument("--port", type=positive, default=8123, help="of that server")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of the step times to compare with")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write the JSON file."""
    check_new_file("--json", arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FILE_VARIABLE] = str(Path(folder) / "steps")
        runs = asyncio.run(_measure(arguments, Path(folder)))
    document = {"options": {name: str(value) for name, value in vars(arguments).items()}, "versions": versions()}
    arguments.json.write_text(json.dumps(document | {"runs": runs}) + "\n", encoding="utf-8")


# --- the table -------------------------------------------------------------------------------------


class StepTimes:
    """The steps of a log, by their ids, in the order of their results."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.planned = {entry.step_id: entry for entry in entries if isinstance(entry, Planned)}
        results = [entry for entry in entries if isinstance(entry, Done) and entry.step_id in self.planned]
        self.done = {entry.step_id: entry for entry in results}
        self.ends = [entry.at for entry in results]  # ascending
        self.chunks: dict[str, list[int]] = defaultdict(list)
        for step_id, planned in self.planned.items():
            if step_id in self.done:
                for request_id in planned.chunks:
                    self.chunks[request_id].append(step_id)

    def last_end_before(self, done: Done) -> float:
        """Return when the result before this one came; the beginning of time if there is none."""
        index = bisect_right(self.ends, done.at) - 2
        return self.ends[index] if index >= 0 else 0.0


def hops_of(
    entries: Sequence[Entry], times: dict[Key, tuple[float, float]], late_s: dict[Key, float]
) -> list[dict[str, float]]:
    """Join the times of each request; return its hops, ms.

    Args:
        times: when each request was sent, and when its first token came.
        late_s: by how much it was sent too late.
    """
    steps, hops = StepTimes(entries), []
    for taken in entries:
        if not isinstance(taken, Taken) or taken.key not in late_s or taken.key not in times:
            continue
        ids = steps.chunks.get(taken.request_id)
        if not ids:
            continue
        sent, came = times[taken.key]
        planned, first, last = steps.planned[ids[0]], steps.done[ids[0]], steps.done[ids[-1]]
        free = max(planned.at, steps.last_end_before(first))
        later_s = sum(steps.done[step_id].busy_s for step_id in ids[1:])
        parts = {
            "late": late_s[taken.key],
            "in": taken.at - sent,
            "plan": planned.at - taken.at,
            "before": free - planned.at,
            "travel": first.at - free - first.busy_s,
            "steps": first.busy_s + later_s,
            "turns": last.at - first.at - later_s,
            "out": came - last.at,
        }
        hops.append({name: round(1000 * value, 3) for name, value in parts.items()})
    return hops


def steps_of(entries: Sequence[Entry], profile: StepTimePredictor | None) -> list[dict[str, Any]]:
    """Return what each step computed and took, ms, beside what was expected of it and what a profile says."""
    steps, rows = StepTimes(entries), []
    for step_id, done in steps.done.items():
        planned = steps.planned[step_id]
        work = StepWork(planned.decode_rows, planned.decode_keys, planned.prompt_tokens, planned.pairs)
        gap_s = done.at - done.busy_s - steps.last_end_before(done)
        times = {"busy": done.busy_s, "host": done.host_s, "early": done.early_s, "expected": planned.expected_s}
        times["lead"] = planned.lead_s or 0.0
        times["gap"] = gap_s if planned.lead_s is not None else 0.0  # else the worker had nothing to do
        times["profile"] = 0.0 if profile is None else profile.seconds(work)
        row: dict[str, Any] = {"decode_rows": planned.decode_rows, "decode_keys": planned.decode_keys}
        row |= {"prompt_tokens": planned.prompt_tokens, "pairs": planned.pairs, "chunks": len(planned.chunks)}
        rows.append(row | {f"{name}_ms": round(1000 * value, 3) for name, value in times.items()})
    return rows


def _show(rate: float, summary: dict[str, Any], hops: list[dict[str, float]], steps: list[dict[str, Any]]) -> None:
    met = f", within targets {summary['attainment']:.1%}" if "attainment" in summary else ""
    spreads = [" ".join(f"{summary[name][f'p{p}']:.1f}" for p in _SHOWN) for name in ("ttft_ms", "tpot_ms", "itl_ms")]
    print(f"\n{rate:g} requests/s{met}; TTFT {spreads[0]}, TPOT {spreads[1]}, ITL {spreads[2]} ms")
    print(f"{'hop':8}" + "".join(f"{f'p{p}':>8}" for p in _SHOWN) + f"{'mean':>8}")
    for name in HOPS:
        values = sorted(request[name] for request in hops)
        shown = [percentile(values, p) for p in _SHOWN] + [sum(values) / len(values)]
        print(f"{name:8}" + "".join(f"{value:8.2f}" for value in shown))
    columns = ("busy", "profile", "expected", "host", "gap", "lead", "early")
    print(f"{'tokens':8}{'steps':>7}" + "".join(f"{name:>9}" for name in columns))
    for low, high in zip(_SIZES, (*_SIZES[1:], 1 << 30), strict=True):
        kind = [step for step in steps if low <= step["prompt_tokens"] < high]
        if kind:
            means = [sum(step[f"{name}_ms"] for step in kind) / len(kind) for name in columns]
            print(f">= {low:<5}{len(kind):7}" + "".join(f"{value:9.2f}" for value in means))


class TimedTarget:
    """A target that notes, by prompt, when each request was sent and when its first token came."""

    def __init__(self, target: LoadTarget) -> None:
        self._target = target
        self.vocab_size, self.max_model_len = target.vocab_size, target.max_model_len
        self.split, self.drafts, self.describe = target.split, target.drafts, target.describe
        self.times: dict[Key, tuple[float, float]] = {}

    async def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """See `LoadTarget.generate`."""
        sent = time.monotonic()
        is_first = True
        async with aclosing(self._target.generate(prompt, output_len, targets)) as arrivals:
            async for count in arrivals:
                if is_first:
                    self.times[key_of(prompt)] = sent, time.monotonic()
                    is_first = False
                yield count


# --- the system ------------------------------------------------------------------------------------


@asynccontextmanager
async def _started(arguments: argparse.Namespace, folder: Path) -> AsyncIterator[LoadTarget]:
    model = find_model(arguments.model)
    engine = engine_arguments(arguments, model) | {"mode": "unified", "scheduler": _SCHEDULER}
    config = make_config(model, engine).freeze()
    if not arguments.http:
        async with start_engine(config, SamplingParams(temperature=0, ignore_eos=True)) as target:
            yield target
        return
    document = msgspec.to_builtins(config)
    document["server"]["port"] = arguments.port
    with _server(document, folder):
        url = f"http://127.0.0.1:{arguments.port}"
        deadline, sampling = time.monotonic() + _START_S, {"temperature": 0, "ignore_eos": True}
        while not await _answers(arguments.port):
            if time.monotonic() > deadline:
                raise ConfigError(f"the server is not ready after {_START_S:g} s")
            await asyncio.sleep(0.25)
        async with connect_to_server(url, None, ModelSpec.load(model).vocab_size, sampling, _TIMEOUT_S) as target:
            yield target


@contextlib.contextmanager
def _server(document: dict[str, Any], folder: Path) -> Iterator[None]:
    """Run the server as a process of its own while the body runs."""
    path = folder / "system.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, "-m", "hbserve", "serve", "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()
            try:
                server.wait(_END_S)
            except subprocess.TimeoutExpired:
                server.kill()


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def _measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    profile = None if arguments.profile is None else profiled_predictor(load_profile(arguments.profile))
    log = folder / "steps"
    runs: list[dict[str, Any]] = []
    async with _started(arguments, folder) as system:
        target = TimedTarget(system)
        source = WorkloadSource(
            trace=load_trace(arguments.trace),
            arrivals="trace",
            duration_s=arguments.duration,
            max_input_len=arguments.max_input_len,
            max_output_len=arguments.max_output_len,
            vocab_size=system.vocab_size,
        )
        await asyncio.sleep(_SETTLE_S)
        for length in _WARM_UP_TOKENS:
            prompt = source.workload(1.0, arguments.seed).draw_tokens(length, length)
            async for _ in target.generate(prompt, 8, {}):
                pass
        for rate in arguments.rate:
            workload = source.workload(rate, arguments.seed + len(runs))
            started = time.monotonic()
            result = await LoadRun(target, workload, arguments.goodput, ALL_TARGETS).run()
            ended = time.monotonic()
            await asyncio.sleep(_SETTLE_S)
            entries = [entry for entry in read_log(log) if started <= entry.at <= ended]
            summary = summarize(result.records, arguments.goodput)
            hops, steps = (
                hops_of(entries, target.times, _lateness(workload, result.records)),
                steps_of(entries, profile),
            )
            core_ms = sorted(1000 * entry.seconds for entry in entries if isinstance(entry, Core))
            _show(rate, summary, hops, steps)
            print(
                f"a step of the scheduler: {' '.join(f'{percentile(core_ms, p):.2f}' for p in _SHOWN)} ms", flush=True
            )
            runs.append(
                {"rate": rate, "summary": summary, "client": result.client.as_dict(result.records), "hops_ms": hops}
                | {"steps": steps}
            )
    return runs


def _lateness(workload: ServeWorkload, records: Sequence[RequestRecord]) -> dict[Key, float]:
    pairs = zip(workload.requests, records, strict=True)
    return {key_of(workload.prompt(request)): record.sent_s - record.arrival_s for request, record in pairs}

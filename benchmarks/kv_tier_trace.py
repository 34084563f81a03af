"""``python -m benchmarks kv_tier_trace FILE``: parts of a Mooncake trace with a host tier and without, side by side.

Two systems start on the same device, and are loaded in turns while the other one is idle. Each part is a stretch of the
trace, as it is, or with prompts of which nothing repeats (`fresh`). All lengths are divided by ``--scale``, so that a
short part has many requests. Pool and tier are to be smaller by the same factor, and the rate higher. Then the same
share of tokens comes back before it is forgotten, and sequences hold the same share of the pool.

Beside the latencies it says where the time goes: number of steps, seconds in which the device computes them and in
which the host launches them, and CPU seconds of the systems' processes by name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from hbserve.bench.request_record import RequestTargets, summarize
from hbserve.bench.serve_workload import ServeRequest, ServeWorkload
from hbserve.bench.target import EngineTarget, start_engine
from hbserve.bench.traces import BLOCK_TOKENS, TraceEntry, load_trace
from hbserve.errors import ConfigError
from hbserve.model_spec import ModelSpec

_BLOCK_SIZE = 16
_FIRST_TOKEN = 10  # the lowest ids are often special tokens
_DRAIN_S = 60.0
_MIN_CPU_S = 0.05
"""A process that uses less is not listed."""


@dataclass(frozen=True)
class _Part:
    """Requests ``first .. first + number - 1`` of the trace."""

    kind: str
    first: int
    number: int


def _part(text: str) -> _Part:
    kind, *numbers = text.split(":")
    if kind not in ("trace", "fresh") or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: must be trace:FIRST:COUNT or fresh:FIRST:COUNT")
    return _Part(kind, int(numbers[0]), int(numbers[1]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("trace", type=Path, metavar="FILE", help="Mooncake's (.jsonl)")
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument(
        "--parts",
        type=_part,
        nargs="+",
        default=[_Part("trace", 400, 128), _Part("fresh", 400, 128)],
        metavar="KIND:FIRST:COUNT",
        help="requests of the trace (default: trace:400:128 fresh:400:128)",
    )
    parser.add_argument("--rate", type=positive_float, default=15.0, help="requests a second (default: 15)")
    parser.add_argument("--scale", type=positive_float, default=16 / 3, help="divides all lengths (default: 5.33)")
    parser.add_argument("--max-input-len", type=positive, default=32768, help="requests with longer ones are left out")
    parser.add_argument("--pool-tokens", type=positive, default=25_600, help="that the pool holds (default: 25600)")
    parser.add_argument("--host-bytes", type=positive, default=18_200_000_000, help="of the tier (default: 18.2 GB)")
    parser.add_argument("--ttft-ms", type=positive_float, default=450.0, help="target (default: 450)")
    parser.add_argument("--tpot-ms", type=positive_float, default=48.0, help="target (default: 48)")
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    check_new_file("--json", arguments.json)
    trace = [entry for entry in load_trace(arguments.trace) if entry.input_len <= arguments.max_input_len]
    for part in arguments.parts:
        if part.number < 2 or part.first + part.number > len(trace):
            raise ConfigError(f"--parts: {part.first}:{part.number}: the trace has {len(trace)} such requests")
    asyncio.run(_measure(arguments, trace))


async def _measure(arguments: argparse.Namespace, trace: list[TraceEntry]) -> None:
    model = find_model(arguments.model)
    vocab_size = ModelSpec.load(model).vocab_size
    loads = [_workload(arguments, trace, part, vocab_size, seed) for seed, part in enumerate(arguments.parts)]
    defaults = {
        "num_blocks": arguments.pool_tokens // _BLOCK_SIZE,
        "block_size": _BLOCK_SIZE,
        "max_model_len": max(load.longest for load in loads) + 1,
    }
    targets = RequestTargets(ttft_ms=arguments.ttft_ms, tpot_ms=arguments.tpot_ms)
    rows: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:

        async def start(host_bytes: int) -> EngineTarget:
            engine = defaults | engine_arguments(arguments, model) | {"host_bytes": host_bytes}
            sampling = SamplingParams(temperature=0, ignore_eos=True)
            return await stack.enter_async_context(start_engine(make_config(model, engine).freeze(), sampling))

        systems = list(zip(("none", "host"), await asyncio.gather(start(0), start(arguments.host_bytes)), strict=True))
        for _, target in systems:
            await _warm_up(target, loads[0])
        for number, (part, load) in enumerate(zip(arguments.parts, loads, strict=True)):
            for name, target in systems if number % 2 == 0 else systems[::-1]:
                before, cpu_before = (await target.describe())["stats"], _cpu_seconds()
                result = await LoadRun(target, load, targets, ("ttft_ms", "tpot_ms"), None, _DRAIN_S).run()
                stats = (await target.describe())["stats"]
                names = "cached_prompt_tokens", "prompt_tokens"
                cached, prompt = (stats["cpu_scheduler"][key] - before["cpu_scheduler"][key] for key in names)
                cpu_s = {
                    name: round(used, 2)
                    for name, seconds in _cpu_seconds().items()
                    if (used := seconds - cpu_before.get(name, 0.0)) > _MIN_CPU_S
                }
                work = {key: _total(stats, key) - _total(before, key) for key in ("steps", "busy_s", "host_s")}
                summary = summarize(result.records, targets)
                rows.append(
                    {"part": asdict(part), "system": name, "cached": cached, "prompt": prompt, "summary": summary}
                    | {"work": work, "cpu_s": cpu_s}
                    | {"tier": stats["kv_tiers"].get("host"), "ttft_s": [record.ttft_s for record in result.records]}
                )
                print(
                    f"{part.kind:6} {name}: {_line(summary)}, {cached / prompt:.1%} of the prompts cached; "
                    f"{work['steps']} steps, {work['busy_s']:.2f} s of the device, {work['host_s']:.2f} s to launch, "
                    f"CPU {cpu_s}",
                    flush=True,
                )
                if arguments.json is not None:  # also if it is ended before the last part
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _total(stats: dict[str, Any], key: str) -> float:
    """Add up a number of all instances."""
    return float(sum(instance[key] for instance in stats["gpu_instances"].values()))


def _cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process and those below it, by name."""
    seconds: dict[str, float] = {}
    waiting = [os.getpid()]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with suppress(OSError):
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            ticks = sum(map(int, rest.split()[11:13]))
            seconds[name] = seconds.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
            for task in (folder / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return seconds


def _line(summary: dict[str, Any]) -> str:
    ttft, tpot = (
        " ".join(f"{(summary[key] or {})[p]:.1f}" for p in ("p50", "p90", "p99")) for key in ("ttft_ms", "tpot_ms")
    )
    return f"{summary['attainment']:.1%} within both targets, TTFT {ttft}, TPOT {tpot} ms"


def _workload(
    arguments: argparse.Namespace, trace: list[TraceEntry], part: _Part, vocab_size: int, seed: int
) -> ServeWorkload:
    """Make the requests of a part. Equal blocks are equal tokens, unless it is fresh."""
    entries = trace[part.first : part.first + part.number]
    times = [entry.arrival_s or 0.0 for entry in entries]
    stretch = (part.number - 1) / arguments.rate / (times[-1] - times[0])
    block_tokens = round(BLOCK_TOKENS / arguments.scale)

    def draw(kind: int, number: int, count: int) -> list[int]:
        tokens: list[int] = (
            np.random.default_rng([seed, kind, number]).integers(_FIRST_TOKEN, vocab_size, count).tolist()
        )
        return tokens

    requests = []
    for number, (entry, time) in enumerate(zip(entries, times, strict=True)):
        length = max(1, round(entry.input_len / arguments.scale))
        blocks = entry.block_ids if part.kind == "trace" else ()
        prompt = [token for block in blocks for token in draw(2, block, block_tokens)][:length]
        prompt += draw(3, number, length - len(prompt))
        output_len = max(2, round(entry.output_len / arguments.scale))
        requests.append(ServeRequest((time - times[0]) * stretch, length, output_len, number, token_ids=tuple(prompt)))
    return ServeWorkload(tuple(requests), seed, vocab_size)


async def _warm_up(target: EngineTarget, load: ServeWorkload) -> None:
    """Send requests of several lengths at once, so that no measured one pays for first-time work."""

    async def ask(length: int) -> None:
        async for _ in target.generate(load.draw_tokens(1 << 29 | length, length), 12, {}):
            pass

    longest = max(request.input_len for request in load.requests)
    await asyncio.gather(*(ask(length) for length in (16, longest // 16, load.mean_input_len, longest)))

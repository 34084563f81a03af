"""Changes of a running system: the longest gaps of streams while roles change, and what learning a profile delays.

``changes``: two unified instances become one for prefill and one for decode, and back, while streams decode and prompts
arrive. ``learning``: a system in mode ``auto`` without a profile of its model learns one, while single requests arrive.
``auto``: a system in mode ``auto`` with given targets, which an operator has changed to replicas, gets a load for which
another plan is predicted to be better; it has to change by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.step_log import FILE_VARIABLE, Done, Entry, Planned, read_log
from benchmarks.stream_load import StreamLoad, random_prompt
from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.bench.arguments import default_load_format, find_model
from hbserve.platform import mps
from hbserve.policy.profile_file import LearntProfile, load_profile, profiled_predictor
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.system.auto_plan import choose
from hbserve.system.running_plan import RunningPlan

_SETTLE_S = 1.0
_TAIL_S = 1.5
"""Time after a change in which gaps still count as the change's."""
_LONG_GAP_S = 0.02
_NUM_SHOWN = 12
_ROUNDED_S = 1e-3
"""What the times of a gap may be off by."""
_PERIOD_S = 2.2
"""Time between two requests while a profile is learnt: the system is idle for most of it."""
_TIME_AFTER_S = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("part", choices=("changes", "learning", "auto"))
    parser.add_argument("--model", required=True, help="a model folder, or the name of a shape, such as qwen3-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", default="0,0", help="changes: GPU of each instance")
    parser.add_argument("--backend", default="shm", help="changes: kv_transfer.backend")
    parser.add_argument("--num-blocks", type=int, default=6000, help="changes: KV blocks of an instance")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of a stream")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt that arrives; 0: none do")
    parser.add_argument("--interval", type=float, default=0.3, metavar="S", help="time between two such prompts")
    parser.add_argument(
        "--output", type=int, default=200, help="auto: mean output tokens; --prompt: mean prompt tokens"
    )
    parser.add_argument("--rate", type=float, default=36.0, help="auto: requests per second")
    parser.add_argument(
        "--targets", type=float, nargs=2, default=(500.0, 10.0), metavar="MS", help="auto: TTFT and TPOT"
    )
    parser.add_argument(
        "--look", type=float, default=30.0, metavar="S", help="auto: time between two looks at the load"
    )
    parser.add_argument("--rounds", type=int, default=3, help="changes there and back")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="changes: prompt tokens of a step at most")
    parser.add_argument("--log-level", default="WARNING", help="of the log on standard error")
    parser.add_argument("--quantization", help="learning: fp8")
    parser.add_argument("--seconds", type=float, default=120.0, help="learning, auto: how long at most")
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(arguments: argparse.Namespace) -> None:
    """Run one part, print its results, and write them as JSON."""
    part = {"changes": _changes, "learning": _learning, "auto": _auto}[arguments.part]
    results = asyncio.run(part(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _instances(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"instance_id": f"unified-{number}", "instance_type": "unified", "gpu_id": int(gpu)}
        for number, gpu in enumerate(given.gpus.split(","))
    ]


def _config(given: argparse.Namespace, **options: Any) -> PdDisaggConfig:
    """Return the configuration of a system in mode auto, whose plan changes."""
    folder = find_model(given.model)
    return PdDisaggConfig.from_arguments(
        str(folder),
        mode="auto",
        device=given.device,
        load_format=default_load_format(folder),
        num_blocks=given.num_blocks,
        max_model_len=4096,
        kv_transfer_backend=given.backend,
        log_level=given.log_level,
        **options,
    )


async def _changes(given: argparse.Namespace) -> dict[str, Any]:
    instances = _instances(given)
    recorded = "benchmarks.step_log:RecordingScheduler"
    config = _config(given, gpu_instances=instances, max_chunk_prefill_tokens=given.chunk, scheduler=recorded)
    rows: list[dict[str, Any]] = []
    half = len(instances) // 2
    apart, together = f"{half}p{len(instances) - half}d", f"unified*{len(instances)}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FILE_VARIABLE] = str(log := Path(folder) / "steps")
        async with DisaggregatedLLM(config) as llm:
            load = StreamLoad(llm, given.streams, given.context, max_tokens=3500)
            async with load.running():
                await _change_rounds(llm, load, given.rounds, apart, together, rows)
                if given.prompt:
                    print(f"and with a prompt of {given.prompt} tokens each {given.interval} s")
                    async with load.arrivals(given.prompt, given.interval, 64):
                        await _change_rounds(llm, load, given.rounds, apart, together, rows)
            counts, stats = _counts(llm), llm.get_system_stats()
            await asyncio.sleep(_SETTLE_S)
            _explain(rows, read_log(log))
    links = {name: link["transfers"] for name, link in stats["kv_transfer"]["links"].items()}
    for name, is_change in (("1.5 s from a change on", True), ("as long without one", False)):
        windows = [row for row in rows if bool(row["change_s"]) is is_change]
        gap, second = (
            max((row[key] for row in windows if not math.isnan(row[key])), default=0.0)
            for key in ("itl_max_ms", "second_token_max_ms")
        )
        number = sum(len(row["long_gaps"]) for row in windows)
        print(f"{name:<23} longest gap {gap:.1f} ms, second token {second:.1f} ms; over 20 ms: {number} moments")
    print(f"failed: {load.failures or 'none'}; {counts}; transfers {links}")
    return {"rows": rows, "counts": counts, "transfers": links, "failures": load.failures}


def _explain(rows: list[dict[str, Any]], entries: list[Entry]) -> None:
    """Add to each long gap each worker's longest step in it, and print the longest gaps."""
    plans = {entry.step_id: entry for entry in entries if isinstance(entry, Planned)}
    done = [entry for entry in entries if isinstance(entry, Done) and entry.step_id in plans]
    wall_s = time.time() - time.monotonic()
    found = [(gap, row["window"]) for row in rows for gap in row["long_gaps"]]
    for gap, _ in found:
        began = gap["at"] - wall_s
        inside = [step for step in done if began < step.at <= began + gap["ms"] / 1000 + _ROUNDED_S]
        for step in sorted(inside, key=lambda step: step.busy_s):
            plan = plans[step.step_id]
            gap["steps"][plan.worker_id] = [plan.prompt_tokens, plan.decode_rows, round(1000 * step.busy_s, 1)]
    for gap, window in sorted(found, key=lambda item: item[0]["ms"], reverse=True)[:_NUM_SHOWN]:
        print(f"{window}: {_clock(gap['at'])} {gap['ms']} ms, {gap['streams']} streams; longest step of each worker:")
        for worker, (tokens, num_rows, ms) in sorted(gap["steps"].items()):
            print(f"    {worker}: {tokens} prompt tokens, {num_rows} decode rows, {ms} ms")


def _counts(llm: DisaggregatedLLM) -> dict[str, int]:
    """Return what went wrong with requests so far."""
    scheduler = llm.get_system_stats()["cpu_scheduler"]
    return {name: scheduler[name] for name in ("failed_requests", "retries", "preemptions")}


async def _change_rounds(
    llm: DisaggregatedLLM, load: StreamLoad, rounds: int, apart: str, together: str, rows: list[dict[str, Any]]
) -> None:
    print(f"{'window':<26}{'change s':>9}{'tokens/s':>10}{'ITL p50':>9}{'p99':>8}{'max':>8}{'2nd token max':>15}  ms")
    running = llm.running_plan
    assert running is not None
    await asyncio.sleep(_SETTLE_S)
    for number in range(bool(rows), rounds + 1):
        for system in (apart, together):
            began = time.monotonic()
            name = f"to {system}" if number else f"to {system}, the first"  # it makes links and loads kernels
            await running.change_to(system)
            took = time.monotonic() - began
            await asyncio.sleep(_TAIL_S)
            _note(rows, name, took, load, began)
            began = time.monotonic()
            await asyncio.sleep(_TAIL_S + took)
            _note(rows, f"steady {system}", 0.0, load, began)


def _note(rows: list[dict[str, Any]], name: str, took: float, load: StreamLoad, began: float) -> None:
    window = load.window(began, time.monotonic())
    row = {
        "window": name,
        "change_s": round(took, 4),
        "tokens_per_s": round(window.tokens_per_s, 1),
        "itl_p50_ms": round(window.running.quantile(0.5), 2),
        "itl_p99_ms": round(window.running.quantile(0.99), 2),
        "itl_max_ms": round(window.running.largest, 2),
        "second_token_max_ms": round(window.starting.largest, 2),
    }
    rows.append(row)
    wall_s = time.time() - time.monotonic()
    print("{:<26}{:>9}{:>10}{:>9}{:>8}{:>8}{:>15}".format(*row.values()), flush=True)
    row["long_gaps"] = [
        {"at": round(wall_s + at, 4), "ms": round(1000 * s, 1), "streams": count, "steps": {}}
        for at, s, count in load.long_gaps(began, time.monotonic(), _LONG_GAP_S)
    ]


def _clock(at: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.gmtime(at))}.{at % 1 * 1000:03.0f}Z"


async def _auto(given: argparse.Namespace) -> dict[str, Any]:
    ttft_ms, tpot_ms = given.targets
    config = _config(given, ttft_target_ms=ttft_ms, tpot_target_ms=tpot_ms, gpu_instances=_instances(given))
    rng, served = random.Random(1), list[tuple[float, list[float]]]()  # arrival and times of tokens
    async with DisaggregatedLLM(config) as llm:
        running = llm.running_plan
        assert running is not None
        print(f"started as {running.plan.instances}: {running.plan.why}")
        await running.change_to(f"unified*{len(running.plan.instances)}")

        async def ask(number: int) -> None:
            length, count = (
                min(2000, max(2, int(mean * rng.lognormvariate(-0.18, 0.6)))) for mean in (given.prompt, given.output)
            )
            prompt = random_prompt(length, number, llm.engine.vocab_size)
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            asked, times = time.monotonic(), list[float]()
            async for delta in llm.stream(prompt, sampling):
                times.extend([time.monotonic()] * len(delta.token_ids))
            served.append((asked, times))

        began, tasks, number = time.monotonic(), set[asyncio.Task[None]](), 0
        next_at, looks = began, asyncio.create_task(_look(running, given.look))
        while time.monotonic() < began + given.seconds:
            number += 1
            tasks.add(asyncio.create_task(ask(number)))
            next_at += rng.expovariate(given.rate)
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        await asyncio.gather(*tasks)
        looks.cancel()
        plan, wall_s = running.plan, time.time() - time.monotonic()
        counts = _counts(llm)
    windows = []
    for start in range(0, int(given.seconds), 2):
        rows = [(asked, times) for asked, times in served if start <= asked - began < start + 2]
        ttfts_ms = [1000 * (times[0] - asked) for asked, times in rows]
        tpots_ms = [1000 * (times[-1] - times[0]) / max(1, len(times) - 1) for _, times in rows]
        met = sum(ttft <= ttft_ms and tpot <= tpot_ms for ttft, tpot in zip(ttfts_ms, tpots_ms, strict=True))
        gaps = [(1000 * (b - a), b) for _, times in served for a, b in itertools.pairwise(times)]
        longest_ms = max((ms for ms, at in gaps if start <= at - began < start + 2), default=0.0)
        window = [start, len(rows), round(met / max(1, len(rows)), 3)]
        window += [round(statistics.median(ms), 1) if ms else 0.0 for ms in (ttfts_ms, tpots_ms)]
        windows.append([*window, round(longest_ms, 1)])
        text = "{:>3} s: {:>3} requests, {:.3f} within both targets; median TTFT {}, TPOT {}; longest gap {} ms"
        print(text.format(*windows[-1]))
    changes = [msgspec.to_builtins(change) for change in plan.changes]
    for change in changes:
        at_s = change["at"] - wall_s - began
        print(f"{at_s:.1f} s, {change['by']}: {change['before']} to {change['after']}: {change['why']}")
    print(counts)
    return {"started": plan.instances, "windows": windows, "changes": changes, "load": plan.load, "counts": counts}


async def _look(running: RunningPlan, interval_s: float) -> None:
    """Have the plan judged sooner than each 30 s; the rule is the same."""
    while True:
        await asyncio.sleep(interval_s)
        await running.look(time.monotonic())


async def _learning(given: argparse.Namespace) -> dict[str, Any]:
    folder = find_model(given.model)
    config = PdDisaggConfig.from_arguments(
        str(folder),
        mode="auto",
        device=given.device,
        load_format=default_load_format(folder),
        quantization=given.quantization,
        log_level=given.log_level,
    )
    rng = random.Random(1)
    llm = DisaggregatedLLM(config)
    if given.device == "cpu" or not mps.gpus():  # a system on a CPU learns none by itself
        path = (given.json or Path("learnt.json")).with_suffix(".profile")
        llm.launcher.learnt_profile = LearntProfile(str(path), "")
    async with llm:
        plan = llm.plan
        assert plan is not None
        learnt = llm.launcher.learnt_profile
        if learnt is None:
            raise SystemExit(f"nothing to learn: {plan.profile}")
        print(f"begins with: {plan.profile} ({plan.profile_origin})")
        begun = time.monotonic()
        learning = await _ask_until(llm, rng, lambda state: state["state"] == "learnt", given.seconds)
        learn_s, state = time.monotonic() - begun, (await llm.client.stats())["profile"]
        after = await _ask_until(llm, rng, lambda _: False, _TIME_AFTER_S)
    results: dict[str, Any] = {"learn_s": round(learn_s, 1), "state": state, "origin": plan.profile_origin}
    print(f"{state} after {learn_s:.1f} s with a request each {_PERIOD_S} s")
    for name, times in (("while learning", learning), ("afterwards", after)):
        times.sort()
        results[name] = [round(ms, 2) for ms in times]
        print(f"TTFT {name:<15} {len(times)} requests: p50 {times[len(times) // 2]:.1f}, max {times[-1]:.1f} ms")
    if state["state"] == "learnt":
        profile = load_profile(learnt.path)
        results["profile"] = [msgspec.to_builtins(point) for point in profile.steps]
        steps = profiled_predictor(profile)
        for work in (StepWork(1, 1024), StepWork(64, 64 * 1024), StepWork(0, 0, 2048, num_pairs(2048, 0))):
            print(f"predicted from the learnt profile: {work[:4]} {1000 * steps.seconds(work):.2f} ms")
        _, again = choose(config.freeze(), lambda _: [])
        results["next_origin"] = again.profile_origin
        print(f"the next start: {again.profile} ({again.profile_origin}), learns: {again.learnt_profile is not None}")
    return results


async def _ask_until(llm: DisaggregatedLLM, rng: random.Random, is_done: Any, timeout_s: float) -> list[float]:
    """Send a request each `_PERIOD_S`, at random moments; returns their times to the first token, ms."""
    times: list[float] = []
    began = time.monotonic()
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    while time.monotonic() - began < timeout_s and not is_done((await llm.client.stats())["profile"]):
        await asyncio.sleep(_PERIOD_S * rng.uniform(0.9, 1.1))
        prompt = random_prompt(200, rng.randrange(10**6), llm.engine.vocab_size)
        asked = time.monotonic()
        async for _ in llm.stream(prompt, sampling):
            times.append(1000 * (time.monotonic() - asked))
            if times[-1] > 1000 * _LONG_GAP_S:
                print(f"    {_clock(time.time())} {times[-1]:.1f} ms to a first token")
            break
    return times

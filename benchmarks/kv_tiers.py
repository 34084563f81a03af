"""``python -m benchmarks kv_tiers``: what the host tier is worth for prompts that were seen before.

    plain     rate of one large copy between the device and pinned memory, in each direction
    lanes     rate of the tier's own copies, of neighbouring and of scattered blocks, checksums included
    TTFT      of prompts that are computed, loaded from the tier, and cached on the device; medians
    ITL       99th percentile of the gaps between tokens of decoding streams: alone, beside requests whose prompts are
              cached on the device, and beside the same requests whose prompts are loaded while others are stored

Each loaded prompt was evicted from the device by others before, which are stored meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    engine_arguments,
    find_model,
    make_config,
    positive,
    positive_float,
)

_TAIL_TOKENS = 24
_BLOCK_SIZE = 16
_SETTLE_S = 6.0
"""Time for what a worker does after it is ready, while it has no steps: pinning host memory, capturing graphs."""
_STORE_S = 0.3
"""Time in which what was computed last is stored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--prompt-lens", type=positive, nargs="+", default=[16384, 32768], metavar="TOKENS")
    parser.add_argument("--repeats", type=positive, default=2)
    parser.add_argument("--streams", type=positive, default=32, help="that decode beside the loads (default: 32)")
    parser.add_argument("--seconds", type=float, default=4.0, help="each part with streams is watched (default: 4)")
    parser.add_argument(
        "--intervals",
        type=positive_float,
        nargs="+",
        default=[0.2, 1.2],
        metavar="S",
        help="between requests beside streams; at 1.2 their own steps are less than 1 %% of all (default: 0.2 1.2)",
    )
    parser.add_argument("--host-bytes", type=positive, default=40 << 30)
    parser.add_argument("--block-bytes", type=positive, default=2359296, help="of the lanes (default: Qwen3-8B, bf16)")
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    result: dict[str, Any] = {"copies": _copies(arguments.block_bytes)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    result |= asyncio.run(_system(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


# --- copies ---------------------------------------------------------------------------------------


def _copies(block_bytes: int) -> dict[str, float]:
    """Measure rates in this process, in GB/s."""
    import torch

    from hbserve.kv_cache.host_memory import HostMemoryOwner
    from hbserve.kv_tiers.host import HostTier
    from hbserve.kv_tiers.lane import CopyJob, Lane
    from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierResult
    from hbserve.platform import make_platform

    on_gpu = torch.cuda.is_available()
    platform = make_platform("cuda" if on_gpu else "cpu", 0, None, 1, 0, 1)
    platform.activate()
    num_blocks = max(8, (2 << 30 if on_gpu else 64 << 20) // block_bytes)
    arena = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device=platform.device)
    plain = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    owner = HostMemoryOwner(num_blocks * block_bytes + 4096)
    owner.reserve()
    slots = HostTier(owner.memory, platform, 0, 1, block_bytes)
    if on_gpu:
        time.sleep(2.0)  # it is pinned in the background
    results: list[TierResult] = []
    lane = Lane(slots, "", arena, 0, lambda job, result: results.append(result))

    def timed(copy: Callable[[], object]) -> float:
        rates = []
        for _ in range(4):
            platform.synchronize()
            began = time.perf_counter()
            copy()
            platform.synchronize()
            rates.append(arena.numel() / (time.perf_counter() - began) / 1e9)
        return max(rates[1:])

    scattered: list[int] = np.random.default_rng(1).permutation(num_blocks).tolist()
    neighbours = list(range(num_blocks))
    keys = [b""] * num_blocks

    def copied(blocks: list[int], loads: bool) -> float:
        checksums: list[list[int]] = []
        if loads:
            _wait(lane, CopyJob(_store(blocks)), results)
            checksums = results[-1].checksums
        command: LoadBlocks | StoreBlocks = _store(blocks)
        if loads:
            command = LoadBlocks(
                epoch=0, job_id=1, tier="host", keys=keys, slots=neighbours, block_ids=blocks, checksums=checksums
            )
        rate = timed(lambda: _wait(lane, CopyJob(command), results))
        assert not results[-1].failures, results[-1]
        return rate

    def _store(blocks: list[int]) -> StoreBlocks:
        return StoreBlocks(epoch=0, job_id=1, tier="host", keys=keys, slots=neighbours, block_ids=blocks)

    rates = {
        "plain_out": timed(lambda: plain.copy_(arena, non_blocking=True)),
        "plain_in": timed(lambda: arena.copy_(plain, non_blocking=True)),
        "store": copied(neighbours, loads=False),
        "store_scattered": copied(scattered, loads=False),
        "load": copied(neighbours, loads=True),
        "load_scattered": copied(scattered, loads=True),
    }
    lane.close()
    owner.close()
    for name, rate in rates.items():
        share = rate / rates["plain_in" if name.startswith("load") else "plain_out"]
        print(f"{name:>16} {rate:7.1f} GB/s {share:6.0%} of plain", flush=True)
    return rates


def _wait(lane: Any, job: Any, results: list[Any]) -> None:
    num_before = len(results)
    lane.put(job)
    while len(results) == num_before:
        time.sleep(0.0002)


# --- a system -------------------------------------------------------------------------------------


async def _system(arguments: argparse.Namespace) -> dict[str, Any]:
    model = find_model(arguments.model)
    longest, num_streams = max(arguments.prompt_lens), arguments.streams
    room = longest + num_streams * (512 + int(arguments.seconds * 500))
    defaults = {
        "num_blocks": (room + longest // 2) // _BLOCK_SIZE,
        "block_size": _BLOCK_SIZE,
        "max_model_len": longest + 4096,
        "host_bytes": arguments.host_bytes,
        "decode_headroom_tokens": 0,
    }
    config = make_config(model, defaults | engine_arguments(arguments, model))
    began = time.perf_counter()
    async with DisaggregatedLLM(config) as llm:
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        await asyncio.sleep(_SETTLE_S)
        probe = _Probe(llm)
        ttft = [await probe.ttft(length, arguments.repeats) for length in arguments.prompt_lens]
        length = min(arguments.prompt_lens)
        itl = [await probe.itl(num_streams, arguments.seconds, length, interval) for interval in arguments.intervals]
        tier = (await llm.client.stats())["kv_tiers"]["host"]
        print({key: tier[key] for key in ("stored_blocks", "loaded_blocks", "skipped_blocks", "failures")})
        for kind in ("store", "load"):
            done = {"store": "stored", "load": "loaded"}[kind]
            if tier[f"{kind}_s"]:
                print(f"{done}: {tier[f'{done}_bytes'] / tier[f'{kind}_s'] / 1e9:.1f} GB/s while they were copied")
    return {"ttft": ttft, "itl": itl, "tier": tier}


class _Probe:
    def __init__(self, llm: DisaggregatedLLM) -> None:
        self._llm = llm
        self._random = np.random.default_rng(7)

    def prompt(self, length: int) -> list[int]:
        tokens: list[int] = self._random.integers(1, self._llm.engine.vocab_size, size=length).tolist()
        return tokens

    async def request(self, prompt: list[int], num_tokens: int = 1) -> tuple[float, int]:
        """Send a request; returns its TTFT in seconds, and its cached tokens."""
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        began, ttft_s, cached = time.monotonic(), 0.0, 0
        async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                if delta.token_ids and not ttft_s:
                    ttft_s, cached = time.monotonic() - began, delta.num_cached_tokens
        return ttft_s, cached

    async def evict(self) -> None:
        """Have the pool forget all prompts, and wait until the tier has what it was given."""
        total = next(iter((await self._llm.client.stats())["gpu_instances"].values()))["kv_blocks"]["total"]
        while total > 0:
            length = min(total * _BLOCK_SIZE, 8192, self._llm.engine.max_model_len - _BLOCK_SIZE)
            await self.request(self.prompt(length))
            total -= length // _BLOCK_SIZE
        await asyncio.sleep(_STORE_S)

    async def ttft(self, length: int, repeats: int) -> dict[str, float]:
        """Measure prompts of one length: computed, cached, and loaded."""
        await self.request(self.prompt(length))
        times: dict[str, list[float]] = {"computed": [], "cached": [], "loaded": []}
        for _ in range(repeats):
            prompt = self.prompt(length)
            times["computed"].append((await self.request(prompt))[0])
            await asyncio.sleep(_STORE_S)
            times["cached"].append((await self.request(prompt))[0])
            await self.evict()
            ttft_s, cached = await self.request(prompt)
            if cached < length - 2 * _BLOCK_SIZE:
                print(f"only {cached} of {length} tokens were loaded", flush=True)
            times["loaded"].append(ttft_s)
        medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
        ratio = medians["loaded"] / medians["computed"]
        shown = ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items())
        print(f"TTFT of {length} tokens: {shown}; loaded is 1/{1 / ratio:.1f} of computed", flush=True)
        return {"length": length, "ratio": ratio} | medians

    async def itl(self, num_streams: int, seconds: float, length: int, interval_s: float) -> dict[str, float]:
        """Watch streams in three parts, in turns, because their contexts grow."""
        prompts = [self.prompt(length) for _ in range(6)]
        for prompt in prompts:
            await self.request(prompt)
        gaps: dict[str, list[float]] = {"alone": [], "cached": [], "loaded": []}
        part = ""
        begun = asyncio.Event()
        num_running = 0

        async def stream() -> None:
            nonlocal num_running
            room = self._llm.engine.max_model_len - 512 - _TAIL_TOKENS
            sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)
            last, last_part = 0.0, ""
            async with aclosing(self._llm.stream(self.prompt(512), sampling)) as deltas:
                async for delta in deltas:
                    if not delta.token_ids:
                        continue
                    now = time.monotonic()
                    if not last:
                        num_running += 1
                        if num_running == num_streams:
                            begun.set()
                    if part and part == last_part:
                        gaps[part].append(now - last)
                    last, last_part = now, part

        streams = [asyncio.create_task(stream()) for _ in range(num_streams)]
        counts = {"cached": 0, "loaded": 0}
        try:
            await asyncio.wait_for(begun.wait(), 60.0)
            for _ in range(2):
                part = "alone"
                await asyncio.sleep(seconds / 2)
                for name in ("cached", "loaded"):
                    part = ""
                    await self.request(prompts[0])
                    before = time.monotonic()
                    part = name
                    number = 0
                    while time.monotonic() < before + seconds / 2:
                        # At the same rate in both parts: a request itself takes steps from the streams.
                        place = 0 if name == "cached" else 1 + (counts[name] + number) % (len(prompts) - 1)
                        number += 1
                        await self.request(prompts[place])
                        await asyncio.sleep(max(0.0, before + number * interval_s - time.monotonic()))
                    counts[name] += number
                part = ""
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        if not gaps["alone"]:
            print("no gap between two tokens of a stream lies in one part: --seconds is too short", flush=True)
            return {}
        p99 = {name: 1000 * sorted(found)[math.ceil(0.99 * len(found)) - 1] for name, found in gaps.items() if found}
        p50 = {name: 1000 * statistics.median(found) for name, found in gaps.items() if found}
        for name, ms in p99.items():
            print(
                f"ITL of {num_streams} streams, {name:>7}: p50 {p50[name]:.2f} ms, p99 {ms:.2f} ms, "
                f"{ms / p99['alone']:.2f} of alone, {ms / p99.get('cached', ms):.2f} of cached, "
                f"{counts.get(name, 0)} requests of {length} tokens, one in {interval_s:g} s",
                flush=True,
            )
        found = {f"{name}_p99_ms": ms for name, ms in p99.items()} | {f"{name}_p50_ms": ms for name, ms in p50.items()}
        return {"interval_s": interval_s} | found

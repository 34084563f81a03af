"""``python -m benchmarks kv_tier_steps``: what copies to and from the host tier cost the steps beside them.

One process runs a model with random weights, as a worker does, and the lanes of its host tier copy meanwhile at a given
rate. Parts in turns: ``off`` copies nothing, ``store`` and ``load`` copy in one direction. Each part runs the same step
again and again: streams that decode, or these beside a chunk of a prompt. It says how long a step takes from end to
end, on the device, and on the host that launches it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbserve.bench.arguments import check_new_file, find_model, positive, positive_float

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner, PendingStep
    from hbserve.kv_tiers.rank_tiers import RankTiers
    from hbserve.messages.tiers import TierResult

_BLOCK_SIZE = 16
_JOB_BYTES = 64 << 20
_MAX_JOBS = 2
_DEPTH = 2  # steps in flight, as in service
_SETTLE_S = 2.0
_TURNS = ("off", "store", "load", "store", "off", "load", "load", "off", "store")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--streams", type=positive, default=32, help="that decode in each step (default: 32)")
    parser.add_argument("--context", type=positive, default=1600, help="tokens of each (default: 1600)")
    parser.add_argument("--chunk", type=int, default=0, help="prompt tokens in each step beside them (default: 0)")
    parser.add_argument("--rate", type=positive_float, default=4.0, help="GB/s that are copied (default: 4)")
    parser.add_argument("--seconds", type=positive_float, default=0.5, help="of a part (default: 0.5)")
    parser.add_argument("--json", type=Path)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    import torch

    check_new_file("--json", arguments.json)
    with torch.inference_mode():
        runner = _make_runner(arguments)
        copier = _Copier(runner, arguments.rate)
        time.sleep(_SETTLE_S)  # the host's memory is pinned in the background
        for kind in ("off", "store", "load"):  # what is loaded and allocated at first use
            copier.begin(kind)
            _steps(runner, arguments, arguments.seconds)
        rows: list[dict[str, Any]] = []
        for kind in _TURNS:
            copier.begin(kind)
            row = _steps(runner, arguments, arguments.seconds)
            rows.append({"kind": kind, "gb_s": copier.end() / arguments.seconds / 1e9} | row)
        copier.close()
    for kind in ("off", "store", "load"):
        means = {
            key: statistics.mean(row[key] for row in rows if row["kind"] == kind) for key in rows[0] if key != "kind"
        }
        print(f"{kind:5} " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _make_runner(arguments: argparse.Namespace) -> ModelRunner:
    from hbserve.config import InstanceRole, from_dict
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.messages.rank import CaptureGraph
    from hbserve.platform import make_platform

    blocks = (arguments.streams + 1) * -(-(arguments.context + arguments.chunk + 1) // _BLOCK_SIZE)
    config = from_dict(
        {
            "mode": "unified",
            "model": {
                "path": str(find_model(arguments.model)),
                "load_format": "dummy",
                "device": arguments.device,
                "max_model_len": arguments.context + arguments.chunk + _BLOCK_SIZE,
            },
            "performance": {
                "num_blocks": 2 * blocks,  # half of them for the copies
                "block_size": _BLOCK_SIZE,
                "max_num_seqs": arguments.streams + 1,
                "max_num_batched_tokens": arguments.streams + max(arguments.chunk, 256),
            },
        }
    )
    platform = make_platform(arguments.device, 0, None, 1)
    platform.activate()
    runner = ModelRunner(config, config.gpu_instances[0], platform, defers_graphs=True)
    if arguments.device == "cuda":
        for _ in runner.capture(CaptureGraph(phase=InstanceRole.DECODE, size=arguments.streams)):
            pass
    return runner


class _Copier:
    """Gives the lanes jobs at a rate, from an event loop in a thread, as a worker has it.

    Args:
        rate: GB/s.
    """

    def __init__(self, runner: ModelRunner, rate: float) -> None:
        from hbserve.kv_cache.host_memory import HostMemoryOwner

        self._runner = runner
        block_bytes = runner.kv_blocks.shape[1]
        self._num_slots = runner.num_blocks // 2
        self._job_blocks = max(1, min(_JOB_BYTES // block_bytes, self._num_slots // 2))
        self._period_s = self._job_blocks * block_bytes / rate / 1e9
        self._memory = HostMemoryOwner(self._num_slots * block_bytes + 4096)
        self._memory.reserve()
        self._kind, self._num_jobs, self._num_open, self._num_bytes = "off", 0, 0, 0
        self._checksums: dict[int, list[int]] = {}
        self._jobs: dict[int, list[int]] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._tiers: RankTiers = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self._loop.call_soon_threadsafe(self._tick)

    def begin(self, kind: str) -> None:
        """Copy from now on: off, store or load."""
        self._kind, self._num_bytes = kind, 0

    def end(self) -> int:
        """Copy nothing more; return the bytes that were copied since it began."""
        self._kind = "off"
        time.sleep(0.05)
        return self._num_bytes

    def close(self) -> None:
        """Give the host's memory back."""
        self._memory.close()

    async def _open(self) -> RankTiers:
        from hbserve.config import KVCacheConfig
        from hbserve.kv_tiers.rank_tiers import RankTiers

        arena, platform = self._runner.kv_blocks, self._runner.platform
        return RankTiers(KVCacheConfig(), self._memory.memory, platform, arena, 0, 1, self._report)

    def _report(self, result: TierResult) -> None:
        self._loop.call_soon_threadsafe(self._on_result, result)

    def _on_result(self, result: TierResult) -> None:
        assert not result.failures, f"a copy has failed: {result.error}"
        self._num_open -= 1
        self._num_bytes += result.num_bytes
        self._checksums |= zip(self._jobs.pop(result.job_id), result.checksums, strict=False)

    def _tick(self) -> None:
        from hbserve.messages.tiers import LoadBlocks, StoreBlocks

        self._loop.call_later(self._period_s, self._tick)
        if self._kind == "off" or self._num_open >= _MAX_JOBS:
            return
        first = self._num_jobs * self._job_blocks % (self._num_slots - self._job_blocks + 1)
        slots = list(range(first, first + self._job_blocks))
        if self._kind == "load" and any(slot not in self._checksums for slot in slots):
            first, slots = 0, list(range(self._job_blocks))
        self._num_jobs += 1
        self._num_open += 1
        self._jobs[self._num_jobs] = slots
        keys = [b"%016d" % slot for slot in slots]
        blocks = [self._num_slots + slot for slot in slots]
        order: dict[str, Any] = {"epoch": 0, "job_id": self._num_jobs, "tier": "host", "keys": keys, "slots": slots}
        if self._kind == "store":
            self._tiers.handle(StoreBlocks(**order, block_ids=blocks))
        else:
            checksums = [self._checksums[slot] for slot in slots]
            self._tiers.handle(LoadBlocks(**order, block_ids=blocks, checksums=checksums))


def _steps(runner: ModelRunner, arguments: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Run steps for some seconds, each launched before the one before has ended; return milliseconds."""
    from hbserve.messages.worker import SequenceState, StepPlan
    from hbserve.policy.probe_step import ProbeSize, probe_rows

    size = ProbeSize(arguments.chunk, 0, arguments.streams, arguments.context)
    states, rows = probe_rows(size, range(runner.num_blocks // 2), runner.layout.block_size)
    in_flight: deque[PendingStep] = deque()
    walls: list[float] = []
    busy: list[float] = []
    host: list[float] = []

    def step(new_sequences: list[SequenceState]) -> None:
        began = time.perf_counter()
        in_flight.append(runner.launch(StepPlan(epoch=0, step_id=0, rows=rows, new_sequences=new_sequences, sends=[])))
        host.append(time.perf_counter() - began)
        if len(in_flight) >= _DEPTH:
            busy.append(in_flight.popleft().result().busy_s)

    step(states)
    for _ in range(3):
        step([])
    busy.clear()
    host.clear()
    last = time.perf_counter()
    end = last + seconds
    while last < end:
        step([])
        now = time.perf_counter()
        walls.append(now - last)
        last = now
    while in_flight:
        in_flight.popleft().result()
    p50, p99 = np.percentile(walls, [50, 99]) * 1e3
    means = {f"{name}_ms": 1e3 * statistics.mean(values) for name, values in (("device", busy), ("launch", host))}
    return {"steps": len(walls), "step_ms": 1e3 * statistics.mean(walls), "p50_ms": p50, "p99_ms": p99} | means

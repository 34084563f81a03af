"""``python -m benchmarks kv_store``: how fast two instances share KV blocks through the Mooncake Store, over TCP.

    library   one process puts values with Mooncake's own calls, another one gets them, all values of a job in one call
    tier      the same blocks by the lanes of the store tier: gathered, sealed and put; got, checked and scattered

Both take turns in the same two processes and with the same store, which ``hbserve store`` runs. Rates are medians, and
so is the share of the library's rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hbserve.bench.arguments import positive

_TIMEOUT_S = 120.0
_WHAT = ("library put", "tier put", "library get", "tier get")
_Rates = dict[str, list[float]]
_DEMO = Path(__file__).parent.parent / "examples" / "models" / "hbserve-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--block-bytes", type=positive, default=2359296, help="of a block (default: Qwen3-8B, bf16)")
    parser.add_argument("--blocks", type=positive, nargs="+", default=[7, 28, 56], help="of a job (default: 7 28 56)")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--json", type=Path)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    most = max(arguments.blocks)
    rates: dict[int, _Rates] = {count: {what: [] for what in _WHAT} for count in arguments.blocks}
    with running_store(4 * most * arguments.block_bytes) as store:
        instances = [_Instance(store.master, arguments.block_bytes, most) for _ in range(2)]
        try:
            for repeat in range(arguments.repeats + 1):
                for count in arguments.blocks:
                    found = _measure(instances, count, repeat)
                    if repeat:  # the first one warms up
                        for what, seconds in found.items():
                            rates[count][what].append(count * arguments.block_bytes / seconds / 1e9)
        finally:
            for instance in instances:
                instance.end()
    rows = [_row(count, found) for count, found in rates.items()]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"block_bytes": arguments.block_bytes, "rows": rows}, indent=1) + "\n")


def _measure(instances: list[_Instance], count: int, repeat: int) -> dict[str, float]:
    """Return the seconds of each job. The order changes with each repeat, as what comes first may be slower."""
    writer, reader = instances
    found: dict[str, float] = {}
    for name in ("library", "tier") if repeat % 2 else ("tier", "library"):
        seed = f"{count}-{repeat}"
        found[f"{name} put"] = writer.ask(f"{name} put", seed, count)
        found[f"{name} get"] = reader.ask(f"{name} get", seed, count)
        writer.ask(f"{name} remove", seed, count)
    return found


def _row(count: int, rates: _Rates) -> dict[str, Any]:
    """Print and return medians; the share is the median of the repeats, whose two jobs ran one after the other."""
    row: dict[str, Any] = {"blocks": count, "rates": rates}
    for what in ("put", "get"):
        pairs = list(zip(rates[f"tier {what}"], rates[f"library {what}"], strict=True))
        tier, library = (statistics.median(side) for side in zip(*pairs, strict=True))
        share = statistics.median(one / other for one, other in pairs)
        row[what] = {"tier": tier, "library": library, "share": share}
        text = f"{what}: {tier:.2f} GB/s by the tier, {library:.2f} by the library, {share:.0%}"
        print(f"{count:>5} blocks, {text}", flush=True)
    return row


@dataclass(frozen=True)
class RunningStore:
    """A store that runs; ``master``: its address."""

    master: str
    pid: int

    def pids(self) -> list[int]:
        """Return the processes of master and memory that run now."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@contextlib.contextmanager
def running_store(num_bytes: int) -> Iterator[RunningStore]:
    """Run ``hbserve store``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "store.yaml"
        store = f"{{master: '{master}', bytes: {num_bytes}}}"
        file.write_text(f"mode: unified\nmodel: {{path: '{_DEMO}', device: cpu}}\nkv_cache:\n  store: {store}\n")
        command = [sys.executable, "-m", "hbserve", "store", "--config", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                if not process.stdout.readline():
                    raise SystemExit("hbserve store has ended")
                yield RunningStore(master, process.pid)
            finally:
                process.terminate()
                process.wait(_TIMEOUT_S)


class _Instance:
    """A process with an arena, a lane in each direction, and a client of its own for the library's calls."""

    def __init__(self, master: str, block_bytes: int, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, master, block_bytes, most), daemon=True)
        self._process.start()
        self.ask("ready", "", 0)

    def ask(self, what: str, seed: str, count: int) -> float:
        """Have the process do something; returns the seconds that it took."""
        self._pipe.send((what, seed, count))
        if not self._pipe.poll(_TIMEOUT_S):
            raise SystemExit(f"no answer to {what!r}")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise SystemExit(answer)
        return float(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, master: str, block_bytes: int, most: int) -> None:
    """Do what is asked, in an instance's process."""
    import torch

    from hbserve.config import StoreTierConfig
    from hbserve.kv_tiers.base import BlockName, KVTierContext
    from hbserve.kv_tiers.lane import CopyJob
    from hbserve.kv_tiers.mooncake import MooncakeTier
    from hbserve.kv_tiers.named_lane import NamedLane
    from hbserve.kv_tiers.sealed import SEAL_BYTES
    from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierResult

    value_bytes = block_bytes + SEAL_BYTES
    context = KVTierContext(StoreTierConfig(bytes=1 << 40, master=master), value_bytes, _TIMEOUT_S)
    arena = torch.randint(0, 256, (most, block_bytes), dtype=torch.uint8)
    results: queue.SimpleQueue[TierResult] = queue.SimpleQueue()
    tier, library = MooncakeTier(context), MooncakeTier(context)
    lanes = {
        what: NamedLane(tier, "tier-", arena, 0, lambda job, result: results.put(result)) for what in ("put", "get")
    }
    values = torch.zeros(most, value_bytes, dtype=torch.uint8)
    library.register(values)

    def copy(what: str, keys: list[bytes]) -> dict[int, str]:
        places = list(range(len(keys)))
        common: dict[str, Any] = {"epoch": 0, "job_id": 1, "tier": "store", "keys": keys}
        common |= {"slots": places, "block_ids": places}
        command = StoreBlocks(**common) if what == "put" else LoadBlocks(**common, checksums=[[] for _ in keys])
        lanes[what].put(CopyJob(command))
        return results.get(timeout=_TIMEOUT_S).failures

    while True:
        what, seed, count = pipe.recv()
        keys = [f"{seed}-{number}".encode() for number in range(count)]
        names = [BlockName(("tier-" if what.startswith("tier") else "library-") + key.hex(), key) for key in keys]
        began = time.perf_counter()
        failures: dict[int, str] = {}
        match what.split():
            case ["tier", "put" | "get" as direction]:
                failures = copy(direction, keys)
            case ["library", "put"]:
                failures = library.put(names, values[:count])
            case ["library", "get"]:
                failures = library.get(names, values[:count])
            case [_, "remove"]:
                library.remove(names)
        seconds = time.perf_counter() - began
        pipe.send(f"{what}: {failures}" if failures else seconds)

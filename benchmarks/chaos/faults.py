"""Signals to processes of a running system, what may follow them, and the systems."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.chaos import processes
from benchmarks.chaos.processes import Process
from benchmarks.chaos.service import configuration

_LONG_STOP_S = 45.0
_SHARE = {"API server": 0.4, "grammar checker": 0.5, "starting process": 0.5, "helper": 0.0}
"""Weight of a kind of process among the others; the loss of the first one costs a system."""


class Expected(NamedTuple):
    """What may follow a signal to a process, see docs/failures.md.

    Attributes:
        errors: with which open requests may end; empty: every request has its right answer.
        exit_code: of the system, which ends; None: it serves again.
    """

    errors: frozenset[str] = frozenset()
    exit_code: int | None = None


_ENDING = frozenset({"no answer", "503 shutting_down", "event shutting_down"})
_CHECK_TOO_LONG = Expected(frozenset({"400 None"}))  # a check that takes 10 s

EXPECTED: dict[tuple[str, str], Expected] = {
    ("API server", "SIGKILL"): Expected(frozenset({"no answer", "broken off"}), -signal.SIGKILL),
    ("API server", "SIGTERM"): Expected(_ENDING, 0),
    ("grammar checker", "SIGSTOP"): _CHECK_TOO_LONG,
    ("grammar checker", "long stop"): _CHECK_TOO_LONG,
    ("grammar process", "long stop"): _CHECK_TOO_LONG,  # or a mask that takes 30 s
}
"""By kind of process and signal; no request is lost by any other."""
KEPT_DESCRIPTORS = {"disaggregated, mooncake": 4}
"""By mode: what a worker keeps of each link that has failed, see docs/kv_transfer.md."""


def systems(model: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations, by the name of the mode in the results."""

    def instances(*names: str, **sizes: int) -> list[dict[str, Any]]:
        return [
            {"instance_id": name, "instance_type": name.rsplit("-", 1)[0].replace("semi", "semi_pd"), "num_threads": 1}
            | ({"tensor_parallel_size": 2} if name.replace("-", "_") in sizes else {})
            for name in names
        ]

    more: dict[str, Any] = {
        "rpc": {"heartbeat_interval_s": 0.2, "heartbeat_timeout_s": 3.0, "step_timeout_s": 30.0, "max_restarts": 1000},
        "chunked_prefill": {"chunk_size": 64},
    }
    disaggregated: dict[str, dict[str, Any]] = {
        "shm": {"gpu_instances": instances("prefill-0", "decode-0", "decode-1", decode_1=2)},
        "nccl": {"gpu_instances": instances("prefill-0", "prefill-1", "decode-0")},
        "mooncake": {"gpu_instances": instances("prefill-0", "decode-0")},
    }
    made = {"unified": configuration(model, "unified", **more, gpu_instances=instances("unified-0", "unified-1"))}
    for backend, parts in disaggregated.items():
        transfer = {"backend": backend, "timeout_s": 5.0, "layer_group_bytes": 4096}
        if backend == "mooncake":
            transfer["mooncake_protocol"] = "tcp"
        name = f"disaggregated, {'gloo' if backend == 'nccl' else backend}"
        made[name] = configuration(model, "disaggregated", **more, **parts, kv_transfer=transfer)
    made["semi_pd"] = configuration(
        model,
        "semi_pd",
        **more,
        gpu_instances=instances("semi-0"),
        semi_pd={"ladder": {"prefill": [100], "decode": [100], "unified": [100]}, "prefill_percentage": 80},
    )
    for number, config in enumerate(made.values()):
        config["server"]["num_tokenizers"] = number % 2
    return made


class Fault(NamedTuple):
    """A signal to a process."""

    process: Process
    name: str
    stop_s: float = 0.0

    @property
    def expected(self) -> Expected:
        """Return what may follow."""
        return EXPECTED.get((self.process.kind, self.name), Expected())

    def __str__(self) -> str:
        stop = f" for {self.stop_s:g} s" if self.stop_s else ""
        return f"{self.name}{stop} to {self.process.title} ({self.process.kind})"


def choose_fault(chance: random.Random, running: list[Process], spare: frozenset[str] = frozenset()) -> Fault:
    """Choose a kind of process first, so that every kind gets its share, then a process and a signal.

    Args:
        spare: kinds that are left alone.
    """
    by_kind: dict[str, list[Process]] = {}
    for process in sorted(running, key=lambda one: one.title):
        if process.kind not in spare:
            by_kind.setdefault(process.kind, []).append(process)
    kinds = sorted(by_kind)
    [kind] = chance.choices(kinds, [_SHARE.get(kind, 1.0) for kind in kinds])
    victim = chance.choice(by_kind[kind])
    name = chance.choices(["SIGKILL", "SIGTERM", "SIGSTOP", "long stop"], [10, 5, 8, 1])[0]
    if name == "SIGSTOP":
        return Fault(victim, name, chance.choice([0.02, 0.2, 1.0, 2.0, 5.0, 12.0]))
    return Fault(victim, name, _LONG_STOP_S if name == "long stop" else 0.0)


async def inflict(fault: Fault) -> None:
    """Send the signal; return when a stopped process runs again. A process that has ended meanwhile is no error."""
    if not processes.is_running(fault.process):
        return
    with contextlib.suppress(ProcessLookupError):
        if not fault.stop_s:
            os.kill(fault.process.pid, signal.Signals[fault.name])
            return
        os.kill(fault.process.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.stop_s)
        finally:
            if processes.is_running(fault.process):
                os.kill(fault.process.pid, signal.SIGCONT)

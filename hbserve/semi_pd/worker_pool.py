"""The worker processes of one instance, from standby to end."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.messages.rank import Standby
from hbserve.messages.supervisor import WorkerSpec
from hbserve.messages.tiers import HostMemory
from hbserve.process.parent import ChildProcess
from hbserve.rpc.async_socket import remove_file
from hbserve.semi_pd.utils import partition_of
from hbserve.semi_pd.worker_process import WakeUp

logger = logging.getLogger(__name__)

_MODULE = "hbserve.semi_pd.worker_process"


class WorkerState(StrEnum):
    """Life of a worker process; `NEXT_STATES` has its legal transitions, drawn in `hbserve.semi_pd.instance_state`."""

    PREPARING = "preparing"
    READY = "ready"
    ACTIVE = "active"
    DRAINING = "retiring"  # the status report's word
    ENDED = "ended"


NEXT_STATES = {
    WorkerState.PREPARING: {WorkerState.READY, WorkerState.DRAINING, WorkerState.ENDED},
    WorkerState.READY: {WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.ENDED},
    WorkerState.ACTIVE: {WorkerState.DRAINING, WorkerState.ENDED},
    WorkerState.DRAINING: {WorkerState.DRAINING, WorkerState.ENDED},  # a recovery lets all drain
    WorkerState.ENDED: set(),
}


class Worker:
    """One worker: a process, or one for each rank of a tensor-parallel group, whose first process owns the others.

    Attributes:
        spec: name, role, share and address, for the scheduler.
        state: ``ready``: has attached, warmed up and listens; ``active``: named to the scheduler.
        has_served: it is or was ``active``, so a scheduler may have sent it steps.
        error: its report if it could not start.
        start_s: seconds of each part of its start; their sum is the time from the order to its answer.
        memory_bytes: device memory of its own when it was ready.
        rank_pids: process ids of its ranks, once it is ready.
    """

    def __init__(self, spec: WorkerSpec, process: ChildProcess) -> None:
        self.spec = spec
        self.process = process
        self.state = WorkerState.PREPARING
        self.has_served = False
        self.error: str | None = None
        self.start_s: dict[str, float] = {}
        self.ordered_at = time.monotonic()
        self.memory_bytes: int | None = None
        self.rank_pids = [process.pid]

    @property
    def level(self) -> tuple[InstanceRole, int]:
        """Role and percentage."""
        return self.spec.role, self.spec.percentage

    def enter(self, state: WorkerState) -> None:
        """Change the state."""
        assert state in NEXT_STATES[self.state], f"{self.spec.worker_id}: {self.state} -> {state}"
        self.state = state
        self.has_served |= state is WorkerState.ACTIVE

    def note_start(self, parts: dict[str, float]) -> None:
        """Note its account of the start; the rest is ``orders``: their travel, and the end of its imports."""
        whole = time.monotonic() - self.ordered_at
        self.start_s = {"orders": whole - sum(parts.values())} | parts

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for status reports."""
        return {
            "worker_id": self.spec.worker_id,
            "role": str(self.spec.role),
            "percentage": self.spec.percentage,
            "pid": self.process.pid,
            "rank_pids": self.rank_pids,
            "state": str(self.state),
            "start_s": self.start_s,
            "memory_bytes": self.memory_bytes,
        }


class WorkerPool:
    """Workers of one instance, and the standbys that become workers. Not thread-safe: its owner has the lock.

    Args:
        config: of the system.
        instance: whose workers these are.
        run_dir: folder for their sockets.
        environment: variables for the processes.
        on_gpu: whether standbys import the modules that only a GPU needs.
        on_ready, on_exit: called from a watcher thread when a worker is ready, or its process has ended.
        on_standby_exit: called from a watcher thread with the exit code of a standby that has ended.
        host: memory of the host for KV blocks.
    """

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        run_dir: str,
        environment: dict[str, str],
        on_gpu: bool,
        on_ready: Callable[[Worker], None],
        on_exit: Callable[[Worker, int], None],
        on_standby_exit: Callable[[int], None],
        host: HostMemory | None = None,
    ) -> None:
        self._config, self._instance, self._run_dir = config, instance, run_dir
        self._environment, self._on_gpu = environment, on_gpu
        self._on_ready, self._on_exit, self._on_standby_exit = on_ready, on_exit, on_standby_exit
        self._host = host
        self._serial = itertools.count(1)
        self._worker_of: dict[ChildProcess, Worker] = {}
        self._standbys: deque[ChildProcess] = deque()
        self._asleep: set[ChildProcess] = set()
        self.workers: dict[str, Worker] = {}
        """Workers that have not ended, by name."""

    def keep_standbys(self, number: int, are_awaited: bool = False) -> None:
        """Start standbys until ``number`` of them run.

        Args:
            are_awaited: a start waits for them; else their imports yield to serving processes.
        """
        self._standbys = deque(standby for standby in self._standbys if standby.is_alive())
        while len(self._standbys) < number:
            self._standbys.append(self._new_process(are_awaited))

    def _new_process(self, is_awaited: bool) -> ChildProcess:
        how = Standby(model=None, on_gpu=self._on_gpu, yields=not is_awaited)
        name = f"{self._instance.instance_id}-standby"
        orders = {
            "config": msgspec.to_builtins(self._config),
            "name": name,
            "num_ranks": self._instance.num_ranks,
            "standby": msgspec.to_builtins(how),
        }

        def on_status(status: dict[str, Any]) -> None:
            worker = self._worker_of.get(process)
            if worker is not None and "error" in status:
                worker.error = status["error"]
            if worker is not None and "ready" in status:
                worker.note_start(status["start_s"])
                worker.memory_bytes = status["memory_bytes"]
                worker.rank_pids = [worker.process.pid, *status["rank_pids"]]
                self._on_ready(worker)
            if "on_standby" in status:
                self._asleep.add(process)

        def on_exit(code: int) -> None:
            self._asleep.discard(process)
            worker = self._worker_of.pop(process, None)
            if worker is None:
                self._on_standby_exit(code)
            else:
                remove_file(worker.spec.address)
                self._on_exit(worker, code)

        process = ChildProcess(
            name, _MODULE, orders, environment=self._environment, on_status=on_status, on_exit=on_exit
        )
        process.start()
        return process

    def wake(self, phase: InstanceRole, percentage: int, attachments: list[dict[str, Any]], is_awaited: bool) -> Worker:
        """Make a worker of a standby, or of a new process if there is none; `on_ready` is called later.

        Args:
            attachments: each rank's `hbserve.engine.arenas.ArenaAttachment`, as plain data.
            is_awaited: no other worker does its work until it is ready.
        """
        priority = self._config.semi_pd.prefill_priority if phase is InstanceRole.PREFILL else 0
        while True:
            process = self._standbys.popleft() if self._standbys else self._new_process(True)
            serial = next(self._serial)
            worker_id = f"{self._instance.instance_id}.{phase}-{percentage}.{serial}"
            address = f"ipc://{self._run_dir}/{self._instance.kv_rank}.{serial}.sock"
            spec = WorkerSpec(worker_id=worker_id, role=phase, percentage=percentage, address=address)
            order = WakeUp(
                instance=msgspec.structs.replace(self._instance, instance_id=worker_id, instance_type=phase),
                address=address,
                partition=partition_of(phase, percentage, priority),
                attachments=attachments,
                host=self._host,
                is_awaited=is_awaited,
            )
            worker = Worker(spec, process)
            process.name = worker_id
            self._worker_of[process] = worker
            self.workers[worker_id] = worker
            # A standby that has died is passed over.
            if process.send(msgspec.to_builtins(order)) and process.is_alive():
                return worker
            self._worker_of.pop(process, None)
            del self.workers[worker_id]

    def at_level(self, level: tuple[InstanceRole, int]) -> list[Worker]:
        """List the workers at a share level that serve or will serve, oldest first."""
        wanted = (WorkerState.PREPARING, WorkerState.READY, WorkerState.ACTIVE)
        return [worker for worker in self.workers.values() if worker.level == level and worker.state in wanted]

    def standbys(self) -> list[dict[str, Any]]:
        """List the standbys for status reports; one that is not asleep still imports."""
        return [
            {"pid": standby.pid, "is_asleep": standby in self._asleep}
            for standby in self._standbys
            if standby.is_alive()
        ]

    def processes(self) -> list[ChildProcess]:
        """List the processes of all workers and standbys."""
        return [*(worker.process for worker in self.workers.values()), *self._standbys]

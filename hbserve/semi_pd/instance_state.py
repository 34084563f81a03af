"""State of one instance: the workers that exist, those that the split wants, and those that serve.

A watcher's thread notes what happens to a process (`instance_life`). The supervisor's thread then changes the workers
(`rotation`, `recovery`). One case needs no supervisor: the watcher of a worker that ends on its own replaces it.

A worker's states, and the methods that change them::

    preparing ─────────────► ready ──────► active ──────► draining ──────────────► ended
      │      _on_worker_ready  │   activate       activate    ▲      _on_worker_exit,
      └────────────────────────┴──────────────────────────────┘       from any state
                    discard, Recovery.recover
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.errors import StartupError
from hbserve.messages.supervisor import ReportEvent, SetWorkers
from hbserve.messages.tiers import HostMemory
from hbserve.process.parent import ChildProcess, RestartBudget
from hbserve.semi_pd.instance_life import InstanceLife, Lifecycle
from hbserve.semi_pd.utils import PHASES, ROLES
from hbserve.semi_pd.worker_pool import Worker, WorkerPool, WorkerState
from hbserve.slo.constraints import SMAllocation

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
ShareLevel = tuple[InstanceRole, int]


class InstanceState(InstanceLife):
    """State of an instance; only its methods change it. They take the lock themselves unless they say otherwise.

    Args:
        allocation: the first split.

    Attributes:
        allocation: the split in force.
        pool: the workers; None before the first start and after the end.
        host: memory of the host for KV blocks, which its owner sets before the first start.
        num_replaced: workers started in place of lost ones.
    """

    def __init__(self, config: Config, instance: InstanceConfig, allocation: SMAllocation) -> None:
        super().__init__(config, instance)
        self.allocation = allocation
        self._shares = {phase: allocation.share_of(phase) for phase in PHASES}
        self.pool: WorkerPool | None = None
        self.host: HostMemory | None = None
        self.num_replaced = 0
        self._on_gpu = False
        self._standby_restarts = RestartBudget(config.rpc.max_restarts)

    # --- life --------------------------------------------------------------------------------------

    def start_workers(self, run_dir: str, environment: dict[str, str], on_gpu: bool) -> None:
        """Make the pool, and start the standbys for the first workers."""
        pool = WorkerPool(
            self._config,
            self.instance,
            run_dir,
            environment,
            on_gpu,
            self._on_worker_ready,
            self._on_worker_exit,
            self._on_standby_exit,
            self.host,
        )
        with self.changed:
            self.check_going()
            self.pool, self._on_gpu = pool, on_gpu
            self._keep_first_standbys(pool)

    def _keep_first_standbys(self, pool: WorkerPool) -> None:
        pool.keep_standbys(len(self.levels(self.allocation)), True)  # they import while the memory is loaded

    def on_stopped(self) -> None:
        """Note that every process has ended; the instance may start again."""
        with self.changed:
            self.pool = self.memory_lost = None
            self.is_told_to_stop = False
            self.enter(Lifecycle.STOPPED)

    def replace_split(self, allocation: SMAllocation) -> SMAllocation:
        """Put a split in force; returns the one before. With the lock held."""
        before, self.allocation = self.allocation, allocation
        return before

    def processes(self) -> list[ChildProcess]:
        """List the running processes of workers and standbys."""
        with self.changed:
            return self.pool.processes() if self.pool is not None else []

    # --- share levels ------------------------------------------------------------------------------

    def levels(self, allocation: SMAllocation) -> set[ShareLevel]:
        """List the share levels, role and percentage, of a split's workers."""
        return {(role, percentage) for role in ROLES for percentage in self.levels_of(role, allocation)}

    def levels_of(self, phase: InstanceRole, allocation: SMAllocation) -> set[int]:
        """List the percentages of one role; those of ``unified`` are the same for all splits."""
        ladder = self._config.semi_pd.ladder
        if phase is InstanceRole.UNIFIED:
            return set(ladder.unified or ())
        fixed = ladder.prefill if phase is InstanceRole.PREFILL else ladder.decode
        return {allocation.share_of(phase), *fixed}

    def all_serve(self) -> bool:
        """Whether the workers are exactly those that the split wants, and all serve. With the lock held."""
        workers = list(self.pool.workers.values()) if self.pool is not None else []
        active = {worker.level for worker in workers if worker.state is WorkerState.ACTIVE}
        return active == self.levels(self.allocation) and all(w.state is WorkerState.ACTIVE for w in workers)

    # --- getting ready -----------------------------------------------------------------------------

    def prepare(self, allocation: SMAllocation, deadline: float) -> None:
        """Start the workers that a split lacks, and wait until they are ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming the worker that failed, or was not ready in time.
        """
        with self.changed:
            while not self._prepare_once(allocation, deadline):
                pass

    def _prepare_once(self, allocation: SMAllocation, deadline: float) -> bool:
        """Do `prepare`; returns False to be called again, because a worker was killed meanwhile. With the lock held."""
        assert self.pool is not None
        attachments = self.residents.attachments
        for phase, percentage in sorted(self.levels(allocation)):
            if not self.pool.at_level((phase, percentage)):
                self.pool.wake(phase, percentage, attachments, is_awaited=not self.is_serving())
        preparing = [w for w in self.pool.workers.values() if w.state is WorkerState.PREPARING]

        def is_over() -> bool:
            return (
                all(worker.state is not WorkerState.PREPARING for worker in preparing)
                or any(worker.state is WorkerState.ENDED for worker in preparing)
                or self.memory_lost is not None
                or self.is_told_to_stop
            )

        in_time = self.changed.wait_for(is_over, max(0.0, deadline - time.monotonic()))
        self.check_going()
        if self.memory_lost is not None:
            raise StartupError(self.memory_lost)
        for worker in preparing:
            if worker.state is WorkerState.ENDED:
                why = worker.error or f"ended with exit code {worker.process.exit_code}; see its log"
                if worker.error is None and self.is_serving() and self.may_try_again():
                    logger.warning("%s: %s; starting another one", worker.spec.worker_id, why)
                    return False
                raise StartupError(f"{worker.spec.worker_id}: {why}")
        if not in_time:
            late = ", ".join(w.spec.worker_id for w in preparing if w.state is WorkerState.PREPARING)
            raise StartupError(f"{late} not ready in time")
        return True

    def discard(self) -> None:
        """End prepared workers that the split in force does not want.

        Such a worker ends when it has been prepared. On a GPU it has as much time as a draining one: killed with work
        in flight, it could take every process on the device with it.
        """
        with self.changed:
            assert self.pool is not None
            wanted = self.levels(self.allocation)
            unserving = (WorkerState.PREPARING, WorkerState.READY)
            unused = [w for w in self.pool.workers.values() if w.state in unserving and w.level not in wanted]
            for worker in unused:
                worker.enter(WorkerState.DRAINING)
        for worker in unused:
            worker.process.terminate()

        def is_over() -> bool:  # a recovery and the end of the instance end all workers
            have_ended = all(worker.state is WorkerState.ENDED for worker in unused)
            return have_ended or self.memory_lost is not None or self.is_told_to_stop

        with self.changed:
            in_time = self.changed.wait_for(is_over, self._config.semi_pd.drain_timeout_s if self._on_gpu else _GRACE_S)
            late = [] if in_time else [worker for worker in unused if worker.state is not WorkerState.ENDED]
        for worker in late:
            logger.error("%s, no longer needed, did not end; killing it", worker.spec.worker_id)
            worker.process.kill()
            worker.process.join(_GRACE_S)

    # --- serving; with the lock held ---------------------------------------------------------------

    def activate(self, phases: Iterable[InstanceRole], reason: str = "a change of workers") -> None:
        """Put ready workers of these phases into service, and let unwanted ones drain.

        The scheduler learns the split's share of a phase together with its workers.
        """
        assert self.pool is not None
        chosen, wanted = set(phases), self.levels(self.allocation)
        self._shares |= {phase: self.allocation.share_of(phase) for phase in PHASES if phase in chosen}
        for worker in self.pool.workers.values():
            if worker.spec.role not in chosen:
                continue
            if worker.state is WorkerState.READY and worker.level in wanted:
                worker.enter(WorkerState.ACTIVE)
            elif worker.state is WorkerState.ACTIVE and worker.level not in wanted:
                worker.enter(WorkerState.DRAINING)
        self.publish(reason)
        self.changed.notify_all()

    def publish(self, reason: str) -> None:
        """Name the workers that serve or drain to the scheduler."""
        if self.link is None or self.pool is None:
            return
        attachments = self._find_attachments()
        workers = [] if attachments is None else list(self.pool.workers.values())
        self.link.send(
            SetWorkers(
                instance_id=self.instance.instance_id,
                arena_epoch=0 if attachments is None else attachments[0]["epoch"],
                workers=[w.spec for w in workers if w.state is WorkerState.ACTIVE],
                draining=[w.spec for w in workers if w.state is WorkerState.DRAINING and w.has_served],
                prefill_percentage=self._shares[InstanceRole.PREFILL],
                decode_percentage=self._shares[InstanceRole.DECODE],
                mixed=self.allocation.mixed,
                reason=reason,
            )
        )

    def replace_lost(self) -> None:
        """Start a worker at every share level of the split in force that has none. With the lock held.

        Without the memory there is nothing to attach to; the recovery that loads it prepares all workers.
        """
        assert self.pool is not None
        attachments = self._find_attachments()
        if attachments is None:
            return
        for level in sorted(self.levels(self.allocation)):
            if self.pool.at_level(level):
                continue
            if not self.may_try_again():
                phase, percentage = level
                why = "was lost, too often to start it again (rpc.max_restarts)"
                self.on_error("given_up", f"the {phase} worker at {percentage} % {why}")
                continue
            self.num_replaced += 1
            self.pool.wake(*level, attachments, is_awaited=True)
        self.keep_standbys()

    def keep_standbys(self) -> None:
        """Start as many standbys as the configuration says. With the lock held."""
        assert self.pool is not None
        self.pool.keep_standbys(self._config.semi_pd.num_sleepers)

    # --- events of processes; in watchers' threads -------------------------------------------------

    def _on_worker_ready(self, worker: Worker) -> None:
        with self.changed:
            if worker.state is not WorkerState.PREPARING:
                return
            worker.enter(WorkerState.READY)
            # The replacement of a lost worker serves at once; other workers wait for their split.
            if self.is_serving() and worker.level in self.levels(self.allocation):
                self.activate([worker.spec.role])
            self.changed.notify_all()

    def _on_worker_exit(self, worker: Worker, code: int) -> None:
        with self.changed:
            before = worker.state
            worker.enter(WorkerState.ENDED)
            if self.pool is not None:
                self.pool.workers.pop(worker.spec.worker_id, None)
            self.changed.notify_all()
            if self.lifecycle is not Lifecycle.RUNNING or before is WorkerState.DRAINING:
                if self.is_serving():
                    self.publish("a drained worker has ended")
                return
            why = f"ended with exit code {code} ({worker.error or before})"
            if before is WorkerState.ACTIVE:
                logger.error("%s %s", worker.spec.worker_id, why)  # the scheduler knows it, and makes the event
            else:
                self.on_error("lost", why, worker.spec.worker_id)
        # On a GPU its end may have ended every process on the device.
        if self._on_gpu and not self.residents.is_healthy():
            self.on_memory_lost(f"{worker.spec.worker_id} ended with exit code {code} and took the memory with it")
            return
        with self.changed:
            if self.is_serving():
                self.publish(f"{worker.spec.worker_id} ended with exit code {code}")
                self.replace_lost()

    def _on_standby_exit(self, code: int) -> None:
        with self.changed:
            if self.lifecycle is not Lifecycle.RUNNING:
                return  # it ends with the instance; or a start passes it over
            subject = f"{self.instance.instance_id}-standby"
            self.on_error("lost", f"ended with exit code {code}", subject)
            if self._standby_restarts.take():
                self.keep_standbys()
            else:
                why = "ended too often to be started again (rpc.max_restarts); until the next rotation there are fewer"
                self.on_error("given_up", why, subject)

    def _find_attachments(self) -> list[dict[str, Any]] | None:
        """Return what workers attach to, by rank; None while the memory is lost, or is being loaded again."""
        return None if self.memory_lost is not None else self.residents.find_attachments()

    def is_settled(self, allocation: SMAllocation) -> bool:
        """Whether nothing is left to do for a requested split: it is in force, or has failed with the memory there."""
        with self.changed:
            return self.memory_lost is None or self.allocation == allocation

    def begin_recovery(self, why: str) -> list[Worker]:
        """Take all workers out of service; returns those to kill."""
        with self.changed:
            assert self.pool is not None
            workers = list(self.pool.workers.values())
            for worker in workers:
                worker.enter(WorkerState.DRAINING)
            self.publish(why)
        return workers

    def begin_restart(self) -> None:
        """Start standbys for the memory's next life.

        Raises:
            StartupError: if the instance was told to stop.
        """
        with self.changed:
            self.memory_lost = None
            self.check_going()
            assert self.pool is not None
            self._keep_first_standbys(self.pool)  # standbys have not touched the device and still run

    def on_scheduler_disconnected(self) -> None:
        """Name the workers to the scheduler that comes next, unless there was nothing to name yet."""
        with self.changed:
            if self.lifecycle is Lifecycle.RUNNING:
                self.publish("the scheduler was started again")
            if self.given_up is not None and self.link is not None:
                event = ReportEvent(kind="given_up", subject=self.instance.instance_id, text=self.given_up)
                self.link.send(event)

    def on_worker_lost(self, worker_id: str, why: str) -> None:
        """End a worker that has failed or is silent, as the scheduler says: only then may others use its blocks."""
        with self.changed:
            worker = self.pool.workers.get(worker_id) if self.pool is not None else None
        if worker is None:
            return
        logger.warning("%s: %s; ending it", worker_id, why)
        threading.Thread(target=worker.process.end, args=(_GRACE_S,), name="semi-pd-end", daemon=True).start()

"""Rotation: other workers at other percentages, while the service goes on.

A worker's share of a GPU is fixed when its process makes its CUDA context, so a new split means new
processes. They are made of sleepers in the background, attach to what the resident process holds,
warm up, and only then are named to the scheduler, which gives them the next plans of their phase and
has the old ones end. Crash recovery is the same thing without a plan for it: workers that are missing
are made, and if the memory itself was lost, the resident process first.

Threads: one supervisor does rotations and recoveries, one after the other; each child has a watcher,
which only changes the books (under one lock) and wakes the supervisor.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from hbserve.cluster_key import ClusterKey
from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.errors import StartupError
from hbserve.messages.supervisor import SetWorkers
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.pd_disagg.supervision import InstanceSupervisor
from hbserve.platform import mps
from hbserve.semi_pd.resident_process_manager import ResidentProcessManager
from hbserve.semi_pd.scheduler_link import SchedulerLink
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController
from hbserve.semi_pd.slo_service import check_slo, make_controller
from hbserve.semi_pd.sm_allocation import SMAllocation
from hbserve.semi_pd.switching import AsynchronousSwitchingController, DelayedSwitchingController
from hbserve.semi_pd.utils import PHASES, semi_pd_system, share_of
from hbserve.semi_pd.worker_set import Worker, WorkerSet, WorkerState

__all__ = ["ProcessRotationManager", "SMAllocation"]

logger = logging.getLogger(__name__)

_RESTART_WINDOW_S = 600.0
_END_TIMEOUT_S = 20.0
_GRACE_S = 5.0
_POLL_S = 0.2
Rung = tuple[InstanceRole, int]


class ProcessRotationManager(InstanceSupervisor):
    """The processes of one ``semi_pd`` instance: MPS, resident process, workers, sleepers.

    Alone it keeps workers that nobody gives plans to; in a system, the launcher makes it and it names
    its workers to the scheduler.

    Args:
        server_args: the system's configuration.
        port_args: None: everything finds each other by private sockets.
        initial_sm_allocation: default: the configuration's.
        gpu_id, tp_rank: which GPU; 0.

    Attributes:
        resident_manager, delayed_switching, async_switching: the parts, to look at and to tune.

    Raises:
        ConfigError: naming what cannot be honoured.
    """

    def __init__(
        self,
        server_args: Config | PdDisaggConfig,
        port_args: None = None,
        initial_sm_allocation: SMAllocation | None = None,
        gpu_id: int = 0,
        tp_rank: int = 0,
    ) -> None:
        self.config, self.instance = semi_pd_system(server_args, gpu_id)
        settings = self.config.semi_pd
        assert settings.prefill_percentage is not None
        assert settings.decode_percentage is not None
        self._allocation = initial_sm_allocation or SMAllocation(
            settings.prefill_percentage, settings.decode_percentage
        )
        self.delayed_switching = DelayedSwitchingController(settings.preparation_timeout_s)
        self.async_switching = AsynchronousSwitchingController(settings.drain_timeout_s)
        self.resident_manager = ResidentProcessManager(
            self.config, port_args, gpu_id, tp_rank, on_lost=self._note_memory_lost
        )
        if settings.slo is not None:
            check_slo(settings.slo)
        self._slo_controller: SLOAwareResourceController | None = None
        self._run_dir: str | None = None
        self._owns_run_dir = True
        self._scheduler_address: str | None = None
        self._link: SchedulerLink | None = None
        self._mps: mps.MpsDaemon | None = None
        self._workers: WorkerSet | None = None
        self._condition = threading.Condition(threading.RLock())
        self._state = "stopped"
        self._is_told_to_stop = False
        self._attachment: dict[str, Any] = {}
        self._requested: SMAllocation | None = None
        self._memory_lost: str | None = None
        self._gone: list[str] = []
        self._losses: deque[float] = deque()
        self._num_rotations = self._num_failed_rotations = self._num_replaced = self._num_recoveries = 0
        self._last_rotation_s: float | None = None
        self._last_error: str | None = None
        self._supervisor: threading.Thread | None = None

    @classmethod
    def supervise(
        cls, config: Config, instance: InstanceConfig, run_dir: str, scheduler_address: str
    ) -> ProcessRotationManager:
        manager = cls(config, gpu_id=instance.gpu_id)
        manager.instance = manager.resident_manager.instance = instance
        manager._run_dir, manager._owns_run_dir = run_dir, False
        manager._scheduler_address = scheduler_address
        return manager

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Start everything and wait until it is ready; False, with the reason in the log, if it cannot."""
        try:
            self.start_or_raise(time.monotonic() + self.config.rpc.start_timeout_s)
        except StartupError as error:
            logger.error("%s", error)
            return False
        return True

    def start_or_raise(self, deadline: float) -> None:
        with self._condition:
            if self._state != "stopped":
                raise StartupError(f"{self.instance.instance_id} is {self._state} already")
            self._check_going()
            self._state = "starting"
        try:
            self._start(deadline)
        except BaseException:
            self._end_everything()
            raise

    def _start(self, deadline: float) -> None:
        if self._run_dir is None:
            self._run_dir = tempfile.mkdtemp(prefix="hbserve-")
        environment: dict[str, str] = {}
        on_gpu = self.config.model.device != "cpu" and bool(mps.gpus())
        if on_gpu:
            self._mps = mps.MpsDaemon()
            self._mps.start()
            environment |= self._mps.environment
            environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks for GPUs while it sleeps wakes no driver
            capability = mps.compute_capability(self.instance.gpu_id)
            if capability is not None:
                # Importing FlashInfer asks the device for this, unless it is told.
                environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a" if capability == "9.0" else capability
        else:
            # Idle OpenMP threads spin otherwise, on cores that the other phase's workers need: steps took
            # ten times as long.
            environment["OMP_WAIT_POLICY"] = "passive"
        if self._owns_run_dir:
            self.resident_manager.run_dir = self._run_dir
        self.resident_manager.environment = environment
        workers = WorkerSet(
            self.config, self.instance, self._run_dir, environment, on_gpu, self._note_ready, self._note_exit
        )
        with self._condition:
            self._check_going()
            self._workers = workers
            workers.keep_sleepers(len(self._rungs(self._allocation)))  # they import while the resident loads
        if self._scheduler_address is not None:
            self._link = SchedulerLink(self._scheduler_address, self._note_worker_lost, ClusterKey.of(self.config))
        self._start_resident(deadline)
        self._prepare(self._allocation, deadline)
        with self._condition:
            self._check_going()
            self._activate(PHASES)
            self._state = "running"
            workers.keep_sleepers(self.config.semi_pd.num_sleepers)
            self._supervisor = threading.Thread(target=self._supervise, name="semi-pd-supervisor", daemon=True)
            self._supervisor.start()
        if self._link is not None and self.config.semi_pd.slo is not None:
            self._slo_controller = make_controller(self.config, self.config.semi_pd.slo, self, self._link)
            self._slo_controller.start_monitoring()

    def tell_to_stop(self) -> None:
        with self._condition:
            self._is_told_to_stop = True
            self._condition.notify_all()
        self.resident_manager.give_up_start()

    def stop(self) -> None:
        with self._condition:
            self._is_told_to_stop = True
            self._condition.notify_all()
            while self._state in ("starting", "stopping"):
                self.resident_manager.give_up_start()
                self._condition.wait(_POLL_S)  # whoever is at it cleans up
            if self._state == "stopped":
                return
            self._state = "stopping"
            processes = self._workers.processes() if self._workers is not None else []
        for process in processes:
            process.terminate()
        while self._supervisor is not None and self._supervisor.is_alive():
            self.resident_manager.give_up_start()
            self._supervisor.join(_POLL_S)
        self._end_everything()

    def _end_everything(self) -> None:
        if self._slo_controller is not None:
            self._slo_controller.stop_monitoring()
        with self._condition:
            self._is_told_to_stop = True
            self._state = "stopping"
            processes = self._workers.processes() if self._workers is not None else []
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in processes:
            if not process.join(max(0.0, deadline - time.monotonic())):
                logger.error("%s did not end within %g s; killing it", process.name, _END_TIMEOUT_S)
                process.kill()
                process.join(_END_TIMEOUT_S)
        self.resident_manager.stop()  # after those that are attached to its memory
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._mps is not None:
            self._mps.stop()
            self._mps = None
        if self._owns_run_dir and self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        with self._condition:
            self._workers = self._supervisor = self._requested = self._memory_lost = None
            self._state, self._is_told_to_stop = "stopped", False
            self._condition.notify_all()

    def _start_resident(self, deadline: float) -> None:
        self._check_going()
        self.resident_manager.start(max(0.0, deadline - time.monotonic()), lambda: self._is_told_to_stop)
        self._attachment = self.resident_manager.attachment

    def _check_going(self) -> None:
        if self._is_told_to_stop:
            raise StartupError(f"{self.instance.instance_id} was told to stop")

    # --- what users ask for ----------------------------------------------------------------------

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """Ask for another split; the change itself happens in the background.

        Of requests that come while a change is under way, the last one is done after it.

        Returns:
            Whether the request was taken: not unless the manager runs.
        """
        with self._condition:
            if self._state != "running":
                return False
            self._requested = new_allocation
            self._condition.notify_all()
        return True

    @property
    def current_sm_allocation(self) -> SMAllocation:
        """The split in force."""
        return self._allocation

    def wait_until_settled(self, timeout: float) -> bool:
        """Wait until no request and no recovery is pending; False if that takes longer."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._state != "running" or (self._is_idle and self._all_rungs_active()), timeout
            )

    @property
    def _is_idle(self) -> bool:
        return self._requested is None and self._memory_lost is None

    def _all_rungs_active(self) -> bool:
        workers = list(self._workers.workers.values()) if self._workers is not None else []
        active = {worker.rung for worker in workers if worker.state is WorkerState.ACTIVE}
        return active == self._rungs(self._allocation) and all(w.state is WorkerState.ACTIVE for w in workers)

    def get_status(self) -> dict[str, Any]:
        """Everything as plain data: state, split, processes, parts, counts."""
        with self._condition:
            workers = list(self._workers.workers.values()) if self._workers is not None else []
            active = [worker for worker in workers if worker.state is WorkerState.ACTIVE]
            shares = {
                str(phase): worker.as_dict()
                for phase in PHASES
                for worker in active
                if worker.rung == (phase, share_of(self._allocation, phase))
            }
            return {
                "instance_id": self.instance.instance_id,
                "state": self._state,
                "current_sm_allocation": asdict(self._allocation),
                "requested_sm_allocation": None if self._requested is None else asdict(self._requested),
                "switch_requested": self._requested is not None,
                "active_processes": shares,
                "workers": [worker.as_dict() for worker in workers],
                "sleepers": self._workers.sleepers() if self._workers is not None else [],
                "warm_percentages": {
                    str(phase): sorted({p for role, p in (w.rung for w in active) if role is phase}) for phase in PHASES
                },
                "resident_manager": self.resident_manager.get_status(),
                "delayed_switching": self.delayed_switching.get_status(),
                "async_switching": self.async_switching.get_status(),
                "mps": None if self._mps is None else {"is_ours": self._mps.is_ours} | self._mps.environment,
                "statistics": {
                    "rotations": self._num_rotations,
                    "failed_rotations": self._num_failed_rotations,
                    "last_rotation_s": self._last_rotation_s,
                    "replaced_workers": self._num_replaced,
                    "recoveries": self._num_recoveries,
                },
                "slo": None if self._slo_controller is None else self._slo_controller.get_controller_status(),
                "last_error": self._last_error,
            }

    # --- supervisor ------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_told_to_stop or not self._is_idle)
                if self._is_told_to_stop:
                    return
                lost, requested = self._memory_lost, self._requested
            try:
                if lost is not None:
                    self._recover(lost)
                else:
                    assert requested is not None
                    self._rotate(requested)
            except StartupError as error:
                self._last_error = str(error)
                logger.error("%s: %s", self.instance.instance_id, error)
            except Exception as error:
                self._last_error = repr(error)
                logger.exception("%s: the supervisor failed", self.instance.instance_id)
            with self._condition:
                if self._requested is requested:
                    self._requested = None
                self._condition.notify_all()

    def _rotate(self, allocation: SMAllocation) -> None:
        started = time.monotonic()
        deadline = started + self.delayed_switching.preparation_timeout
        self.delayed_switching.request_delayed_switch(lambda: self._prepare(allocation, deadline))
        if not self.delayed_switching.wait_for_switch_ready():
            self._num_failed_rotations += 1
            self._last_error = f"no rotation to {allocation}: {self.delayed_switching.error}"
            logger.error("%s: %s", self.instance.instance_id, self._last_error)
            self._discard()
            return
        with self._condition:
            if self._memory_lost is not None or self._state != "running":
                return  # the recovery makes workers for whatever split is in force then
            before, self._allocation = self._allocation, allocation
            changes = [phase for phase in PHASES if self._rungs_of(phase, before) != self._rungs_of(phase, allocation)]
            if not changes:
                self._publish("the shares change")
        for phase in changes:
            self._switch(phase, allocation)
        timeout = self.async_switching.drain_timeout
        if all(self.async_switching.wait_for_switch_completion(phase, 2 * timeout) for phase in changes):
            self._num_rotations += 1
        self._last_rotation_s = time.monotonic() - started
        with self._condition:
            if self._state == "running" and self._memory_lost is None:
                self._replace_lost()

    def _switch(self, phase: InstanceRole, allocation: SMAllocation) -> None:
        """Name a phase's new workers to the scheduler and let the old ones drain."""
        with self._condition:
            assert self._workers is not None
            made = self._workers.of_rung((phase, share_of(allocation, phase)))
            self._activate([phase])
            old = [w for w in self._workers.workers.values() if w.state is WorkerState.RETIRING]
            old = [worker for worker in old if worker.spec.role is phase]

        def drained() -> bool:
            if self._link is None:
                for worker in old:
                    worker.process.terminate()
            deadline = time.monotonic() + self.async_switching.drain_timeout
            done = [worker.process.join(max(0.0, deadline - time.monotonic())) for worker in old]
            if all(done):
                return True
            for worker, ended in zip(old, done, strict=True):
                if not ended:
                    worker.process.kill()
            return False

        self.async_switching.start_asynchronous_switch(phase, None, made[-1].process if made else None, drained)

    def _recover(self, why: str) -> None:
        """The memory is lost: end every worker, begin anew, and have everything computed again."""
        logger.warning("%s: %s; starting again", self.instance.instance_id, why)
        assert self._workers is not None
        with self._condition:
            workers = list(self._workers.workers.values())
            for worker in workers:
                worker.state = WorkerState.RETIRING
            self._publish(why)
        for worker in workers:
            worker.process.kill()  # nothing of what it could still compute is of use
        for worker in workers:
            worker.process.join(_END_TIMEOUT_S)
        self.resident_manager.stop()
        if self._mps is not None:
            self._mps.restart()
        deadline = time.monotonic() + self.config.rpc.start_timeout_s
        with self._condition:
            self._memory_lost = None
            self._check_going()
        try:
            self._start_resident(deadline)
            self._prepare(self._allocation, deadline)
        except StartupError as error:
            self._discard()
            with self._condition:
                if self._state == "running" and self._may_try_again():
                    self._memory_lost = str(error)
            raise
        with self._condition:
            self._activate(PHASES)
            self._num_recoveries += 1
            self._workers.keep_sleepers(self.config.semi_pd.num_sleepers)

    def _prepare(self, allocation: SMAllocation, deadline: float) -> bool:
        """Make the workers that a split lacks, and wait until they are ready.

        Raises:
            StartupError: naming the one that failed, or was not ready in time.
        """
        with self._condition:
            assert self._workers is not None
            for phase, percentage in sorted(self._rungs(allocation)):
                if not self._workers.of_rung((phase, percentage)):
                    self._workers.wake(phase, percentage, self._attachment)
            preparing = [w for w in self._workers.workers.values() if w.state is WorkerState.PREPARING]

            def is_over() -> bool:
                return (
                    all(worker.state is not WorkerState.PREPARING for worker in preparing)
                    or any(worker.state is WorkerState.ENDED for worker in preparing)
                    or self._memory_lost is not None
                    or self._is_told_to_stop
                )

            in_time = self._condition.wait_for(is_over, max(0.0, deadline - time.monotonic()))
            self._check_going()
            for worker in preparing:
                if worker.state is WorkerState.ENDED:
                    why = worker.error or f"ended with exit code {worker.process.exit_code}; see its log"
                    raise StartupError(f"{worker.spec.worker_id}: {why}")
            if self._memory_lost is not None:
                raise StartupError(self._memory_lost)
            if not in_time:
                late = ", ".join(w.spec.worker_id for w in preparing if w.state is WorkerState.PREPARING)
                raise StartupError(f"{late} not ready in time")
        return True

    def _discard(self) -> None:
        """End what was prepared in vain."""
        with self._condition:
            assert self._workers is not None
            wanted = self._rungs(self._allocation)
            unserving = (WorkerState.PREPARING, WorkerState.READY)
            unused = [w for w in self._workers.workers.values() if w.state in unserving and w.rung not in wanted]
            for worker in unused:
                worker.state = WorkerState.RETIRING
        for worker in unused:
            worker.process.end(_GRACE_S)

    # --- the books; with the lock held -----------------------------------------------------------

    def _rungs(self, allocation: SMAllocation) -> set[Rung]:
        return {(phase, percentage) for phase in PHASES for percentage in self._rungs_of(phase, allocation)}

    def _rungs_of(self, phase: InstanceRole, allocation: SMAllocation) -> set[int]:
        ladder = self.config.semi_pd.ladder
        fixed = ladder.prefill if phase is InstanceRole.PREFILL else ladder.decode
        return {share_of(allocation, phase), *fixed}

    def _activate(self, phases: list[InstanceRole] | tuple[InstanceRole, ...]) -> None:
        """Put ready workers of these phases into service, retire those whose rung is no longer wanted."""
        assert self._workers is not None
        wanted = self._rungs(self._allocation)
        for worker in self._workers.workers.values():
            if worker.spec.role not in phases:
                continue
            if worker.state is WorkerState.READY and worker.rung in wanted:
                worker.state = WorkerState.ACTIVE
            elif worker.state is WorkerState.ACTIVE and worker.rung not in wanted:
                worker.state = WorkerState.RETIRING
        self._publish("a change of workers")
        self._condition.notify_all()

    def _publish(self, reason: str) -> None:
        """Tell the scheduler which workers there are."""
        if self._link is None or self._workers is None:
            return
        active = [w.spec for w in self._workers.workers.values() if w.state is WorkerState.ACTIVE]
        is_lost = self._memory_lost is not None
        gone, self._gone = self._gone, []
        self._link.send(
            SetWorkers(
                instance_id=self.instance.instance_id,
                arena_epoch=0 if is_lost else self._attachment["epoch"],
                workers=[] if is_lost else active,
                gone=gone,
                prefill_percentage=self._allocation.prefill_percentage,
                decode_percentage=self._allocation.decode_percentage,
                reason=reason,
            )
        )

    def _replace_lost(self) -> None:
        """Make a worker of every rung of the split in force that has none."""
        assert self._workers is not None
        for rung in sorted(self._rungs(self._allocation)):
            if self._workers.of_rung(rung):
                continue
            if not self._may_try_again():
                phase, percentage = rung
                self._last_error = f"the {phase} worker at {percentage} % was lost, too often to make it again"
                logger.error("%s: %s (rpc.max_restarts)", self.instance.instance_id, self._last_error)
                continue
            self._num_replaced += 1
            self._workers.wake(*rung, self._attachment)
        self._workers.keep_sleepers(self.config.semi_pd.num_sleepers)

    def _may_try_again(self) -> bool:
        """Whether one more loss in the last minutes is still bearable."""
        now = time.monotonic()
        while self._losses and now - self._losses[0] > _RESTART_WINDOW_S:
            self._losses.popleft()
        self._losses.append(now)
        return len(self._losses) <= self.config.rpc.max_restarts

    # --- watchers' threads -----------------------------------------------------------------------

    def _note_ready(self, worker: Worker) -> None:
        with self._condition:
            if worker.state is not WorkerState.PREPARING:
                return
            worker.state = WorkerState.READY
            # One that was made in place of a lost one is put to work at once; others wait for their split.
            if self._state == "running" and self._memory_lost is None and worker.rung in self._rungs(self._allocation):
                self._activate([worker.spec.role])
            self._condition.notify_all()

    def _note_exit(self, worker: Worker, code: int) -> None:
        with self._condition:
            before, worker.state = worker.state, WorkerState.ENDED
            if self._workers is not None:
                self._workers.workers.pop(worker.spec.worker_id, None)
            self._gone.append(worker.spec.worker_id)
            self._condition.notify_all()
            if self._state != "running" or before is WorkerState.RETIRING:
                if self._state == "running" and self._memory_lost is None:
                    self._publish("a retired worker has ended")
                return
            logger.error("%s ended with exit code %d (%s)", worker.spec.worker_id, code, worker.error or before)
        if self._mps is not None and not self.resident_manager.is_healthy():
            self._note_memory_lost(f"{worker.spec.worker_id} ended with exit code {code} and took the GPU with it")
            return
        with self._condition:
            if self._memory_lost is not None or self._state != "running":
                return
            self._publish(f"{worker.spec.worker_id} ended with exit code {code}")
            self._replace_lost()

    def _note_memory_lost(self, why: str) -> None:
        with self._condition:
            if self._memory_lost is None and self._state == "running":
                self._memory_lost = why
                self._last_error = why
            self._condition.notify_all()

    def _note_worker_lost(self, worker_id: str, why: str) -> None:
        """The scheduler says that a worker has failed or is silent: it must end before others may go on."""
        with self._condition:
            worker = self._workers.workers.get(worker_id) if self._workers is not None else None
        if worker is None:
            return
        logger.warning("%s: %s; ending it", worker_id, why)
        threading.Thread(target=worker.process.end, args=(_GRACE_S,), name="semi-pd-end", daemon=True).start()

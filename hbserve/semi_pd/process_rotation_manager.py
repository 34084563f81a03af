"""The owner of all processes of one instance whose prefill and decode share a device.

Runs in the launcher's process, or in a user's program. A worker's share of a GPU is fixed when its process begins to
use the GPU, so a new split needs new processes. Standbys become these in the background (`hbserve.semi_pd.rotation`).
If the memory is lost, all processes start again (`hbserve.semi_pd.recovery`).

One supervisor thread does rotations and recoveries, one after the other. The watcher thread of each child only changes
`hbserve.semi_pd.instance_state` and wakes the supervisor. `hbserve.semi_pd` draws the processes.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import ConfigError, StartupError
from hbserve.messages.tiers import HostMemory
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.semi_pd.device_sharing import DeviceSharing
from hbserve.semi_pd.instance_life import Lifecycle
from hbserve.semi_pd.instance_state import InstanceState
from hbserve.semi_pd.recovery import Recovery
from hbserve.semi_pd.resident_process_manager import ResidentProcessManager
from hbserve.semi_pd.rotation import Rotation
from hbserve.semi_pd.scheduler_link import SchedulerLink
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController
from hbserve.semi_pd.slo_service import check_slo, make_controller
from hbserve.semi_pd.switching import AsynchronousSwitchingController, DelayedSwitchingController
from hbserve.semi_pd.utils import PHASES, ROLES, semi_pd_system
from hbserve.semi_pd.worker_pool import WorkerState
from hbserve.slo.constraints import SMAllocation

__all__ = ["ProcessRotationManager", "SMAllocation"]

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 20.0
_POLL_S = 0.2


class ProcessRotationManager:
    """Owner of the processes of one ``semi_pd`` instance: MPS, resident processes, workers, standbys.

    In a system, the launcher makes the manager, and the manager names its workers to the scheduler. Alone it keeps
    workers that get no plans. A manager has all ranks of its instance: each worker is one process per rank, and the
    ranks rotate, fail and are replaced together.

    Args:
        server_args: the system's configuration.
        port_args: see `hbserve.semi_pd.utils.semi_pd_system`.
        initial_sm_allocation: default: the configuration's.
        gpu_id: of the instance's first rank; the others' follow.
        tp_rank: 0: one manager has all ranks.

    Attributes:
        resident_manager, delayed_switching, async_switching: the parts, to look at and to tune; the first
            is that of rank 0.
        mark_rotation: called from a thread with True when a rotation begins and with False when it ends. In a system it
            tells the scheduler, which leaves the time between out of windows.

    Raises:
        ConfigError: naming what cannot be honoured.
    """

    def __init__(
        self,
        server_args: Config | PdDisaggConfig,
        port_args: Any = None,
        initial_sm_allocation: SMAllocation | None = None,
        gpu_id: int = 0,
        tp_rank: int = 0,
    ) -> None:
        config, instance = semi_pd_system(server_args, gpu_id, port_args)
        self._build(config, instance, initial_sm_allocation)
        if tp_rank != 0:
            raise ConfigError(f"tp_rank: one manager has all ranks of an instance, and is rank 0's; got {tp_rank}")

    def _build(self, config: Config, instance: InstanceConfig, allocation: SMAllocation | None) -> None:
        self.config, self.instance = config, instance
        settings = config.semi_pd
        assert settings.prefill_percentage is not None
        assert settings.decode_percentage is not None
        shares = settings.prefill_percentage, settings.decode_percentage
        allocation = allocation or SMAllocation(*shares, mixed=bool(settings.mixed))
        self._state = InstanceState(config, instance, allocation)
        self._check_possible(allocation)
        if settings.slo is not None:
            check_slo(settings.slo)
        self._device = DeviceSharing(config, instance)
        self.delayed_switching = DelayedSwitchingController(settings.preparation_timeout_s)
        self.async_switching = AsynchronousSwitchingController(settings.drain_timeout_s)
        self.mark_rotation: Callable[[bool], None] = self._mark_rotation
        self._rotation = Rotation(
            self._state, self.delayed_switching, self.async_switching, lambda begins: self.mark_rotation(begins)
        )
        self._recovery = Recovery(self._state, self._device.restart, config.rpc.start_timeout_s)
        self._controller: SLOAwareResourceController | None = None
        self._run_dir: str | None = None
        self._owns_run_dir = True
        self._scheduler_address: str | None = None
        self._requested: SMAllocation | None = None
        self._supervisor: threading.Thread | None = None

    @classmethod
    def supervise(
        cls,
        config: Config,
        instance: InstanceConfig,
        run_dir: str,
        scheduler_address: str,
        host: HostMemory | None = None,
    ) -> ProcessRotationManager:
        """Make the manager of an instance that the launcher starts and stops; nothing is started yet.

        Args:
            run_dir: private folder for sockets.
            scheduler_address: address for `hbserve.messages.supervisor.SetWorkers`, which announce the workers.
            host: memory of the host for KV blocks, which the launcher owns.
        """
        manager = cls.__new__(cls)
        manager._build(config, instance, None)
        manager._run_dir, manager._owns_run_dir = run_dir, False
        manager._scheduler_address = scheduler_address
        manager._state.host = host
        return manager

    @property
    def resident_manager(self) -> ResidentProcessManager:
        """Manager of rank 0's resident process."""
        return self._state.residents.ranks[0]

    def attach_controller(self, controller: SLOAwareResourceController) -> None:
        """Show a controller in the status; its owner starts and stops it.

        Raises:
            ConfigError: if the split has a controller already.
        """
        if self._controller is not None or (self._scheduler_address is not None and self.config.semi_pd.slo):
            raise ConfigError(
                "semi_pd.slo: the split has a controller by the configuration; take that out, or give no other targets",
                "semi_pd.slo",
            )
        self._controller = controller

    # --- life --------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Start everything and wait until it is ready; returns False, with the reason in the log, if that fails."""
        try:
            self.start_or_raise(time.monotonic() + self.config.rpc.start_timeout_s)
        except StartupError as error:
            logger.error("%s", error)
            return False
        return True

    def start_or_raise(self, deadline: float) -> None:
        """Start all processes and return when they are ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming what failed and why.
        """
        state = self._state
        with state.changed:
            if state.lifecycle is not Lifecycle.STOPPED:
                raise StartupError(f"{self.instance.instance_id} is {state.lifecycle} already")
            state.check_going()
            state.enter(Lifecycle.STARTING)
        try:
            self._start(deadline)
        except BaseException:
            self._end_everything()
            raise

    def _start(self, deadline: float) -> None:
        state, settings = self._state, self.config.semi_pd
        if settings.slo is not None and self._scheduler_address is None and self._controller is None:
            raise StartupError("semi_pd.slo: without a scheduler there are no latencies to read; use SemiPDCoordinator")
        if self._run_dir is None:
            self._run_dir = tempfile.mkdtemp(prefix="hbserve-")
        environment = self._device.start()
        state.residents.configure(environment, self._run_dir if self._owns_run_dir else None)
        state.start_workers(self._run_dir, environment, self._device.on_gpu)
        if self._scheduler_address is not None:
            key = ClusterKey.of(self.config)
            state.link = SchedulerLink(
                self._scheduler_address, state.on_worker_lost, state.on_scheduler_disconnected, key
            )
        state.start_memory(deadline)
        state.prepare(state.allocation, deadline)
        with state.changed:
            state.check_going()
            state.activate(ROLES)
            state.enter(Lifecycle.RUNNING)
            state.keep_standbys()
            self._supervisor = threading.Thread(target=self._supervise, name="semi-pd-supervisor", daemon=True)
            self._supervisor.start()
        if state.link is not None and settings.slo is not None:
            self._controller = make_controller(self.config, settings.slo, self, state.link)
            self._controller.start_monitoring()

    def tell_to_stop(self) -> None:
        """Make a running start give up; does not block. Any thread may call this."""
        self._state.tell_to_stop()

    def stop(self) -> None:
        """End all processes; may block. May be called in every state."""
        state = self._state
        state.tell_to_stop()
        with state.changed:
            while state.lifecycle in (Lifecycle.STARTING, Lifecycle.STOPPING):
                state.residents.notify_cancelled()
                state.changed.wait(_POLL_S)  # the thread that starts or stops it cleans up
            if state.lifecycle is Lifecycle.STOPPED:
                return
            state.enter(Lifecycle.STOPPING)
        for process in state.processes():
            process.terminate()
        while self._supervisor is not None and self._supervisor.is_alive():
            state.residents.notify_cancelled()
            self._supervisor.join(_POLL_S)
        self._end_everything()

    def _end_everything(self) -> None:
        state = self._state
        if state.link is not None and self._controller is not None:
            self._controller.stop_monitoring()
            self._controller = None
        state.tell_to_stop()
        with state.changed:
            state.enter(Lifecycle.STOPPING)
        processes = state.processes()
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in processes:
            if not process.join(max(0.0, deadline - time.monotonic())):
                logger.error("%s did not end within %g s; killing it", process.name, _END_TIMEOUT_S)
                process.kill()
                process.join(_END_TIMEOUT_S)
        state.residents.stop()  # after the workers that are attached to their memory
        if state.link is not None:
            state.link.close()
            state.link = None
        self._device.stop()
        if self._owns_run_dir and self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        with state.changed:
            self._supervisor = self._requested = None
            state.on_stopped()

    # --- requests of users -------------------------------------------------------------------------

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """Ask for another split; the change happens in the background.

        While a change is under way, the latest request waits for its end and replaces earlier ones. A request is kept
        while the instance recovers from the loss of its memory. A change between
        warm percentages, or between mixing and side by side, is one message and starts no process.

        Returns:
            Whether the request was accepted: False unless the manager runs.

        Raises:
            ConfigError: if the split is ``mixed``, and there is no worker for that.
        """
        self._check_possible(new_allocation)
        with self._state.changed:
            if self._state.lifecycle is not Lifecycle.RUNNING:
                return False
            self._requested = new_allocation
            self._state.changed.notify_all()
        return True

    def _check_possible(self, allocation: SMAllocation) -> None:
        if allocation.mixed and not self._state.levels_of(InstanceRole.UNIFIED, allocation):
            raise ConfigError("mixed: there is no worker of both phases; give semi_pd.ladder.unified: [100]", "mixed")

    @property
    def current_sm_allocation(self) -> SMAllocation:
        """Split in force."""
        return self._state.allocation

    def wait_until_settled(self, timeout: float) -> bool:
        """Wait until no request and no recovery is pending; returns False if that takes longer."""
        state = self._state
        with state.changed:
            return state.changed.wait_for(
                lambda: state.lifecycle is not Lifecycle.RUNNING or (self._is_idle and state.all_serve()), timeout
            )

    @property
    def _is_idle(self) -> bool:
        return self._requested is None and self._state.memory_lost is None

    def get_status(self) -> dict[str, Any]:
        """Return everything as plain data: state, split, processes, parts, counts."""
        state = self._state
        with state.changed:
            workers = [] if state.pool is None else list(state.pool.workers.values())
            active = [worker for worker in workers if worker.state is WorkerState.ACTIVE]
            requested = self._requested
            return {
                "instance_id": self.instance.instance_id,
                "state": str(state.lifecycle),
                "current_sm_allocation": asdict(state.allocation),
                "requested_sm_allocation": None if requested is None else asdict(requested),
                "switch_requested": requested is not None,
                "active_processes": {
                    str(worker.spec.role): worker.as_dict()
                    for worker in active
                    if worker.level in {(phase, state.allocation.share_of(phase)) for phase in PHASES}
                },
                "workers": [worker.as_dict() for worker in workers],
                "sleepers": [] if state.pool is None else state.pool.standbys(),
                "warm_percentages": {
                    str(role): sorted({worker.spec.percentage for worker in active if worker.spec.role is role})
                    for role in ROLES
                },
                "resident_manager": state.residents.get_status(),
                "statistics": {
                    "rotations": self._rotation.num_done,
                    "failed_rotations": self._rotation.num_failed,
                    "last_rotation_s": self._rotation.last_s,
                    "replaced_workers": state.num_replaced,
                    "recoveries": self._recovery.num_done,
                },
                "last_error": state.last_error,
                "delayed_switching": self.delayed_switching.get_status(),
                "async_switching": self.async_switching.get_status(),
                "mps": self._device.get_status(),
                "slo": None if self._controller is None else self._controller.get_controller_status(),
            }

    # --- supervisor's thread -----------------------------------------------------------------------

    def _supervise(self) -> None:
        state = self._state
        while True:
            with state.changed:
                state.changed.wait_for(lambda: state.is_told_to_stop or not self._is_idle)
                if state.is_told_to_stop:
                    return
                lost, requested = state.memory_lost, self._requested
            is_settled = lost is None
            try:
                if lost is not None:
                    self._recovery.recover(lost)
                else:
                    assert requested is not None
                    is_settled = self._rotate(requested)
            except StartupError as error:
                state.on_error("rotation_failed" if lost is None else "recovery_failed", str(error))
            except Exception as error:
                logger.exception("%s: the supervisor failed", self.instance.instance_id)
                state.on_error("rotation_failed" if lost is None else "recovery_failed", repr(error))
            with state.changed:
                # A recovery starts the workers of the split in force; a requested split comes after it.
                if is_settled and self._requested is requested:
                    self._requested = None
                state.changed.notify_all()

    def _rotate(self, requested: SMAllocation) -> bool:
        """Try a requested split; returns False if it must be tried again after a recovery.

        A split whose preparation takes the memory with it each time is given up after ``rpc.max_restarts``.
        """
        if self._rotation.rotate(requested):
            return True
        if self._state.may_try_again():
            return False
        self._rotation.give_up(requested, "the memory was lost too often while it was prepared (rpc.max_restarts)")
        return True

    def _mark_rotation(self, begins: bool) -> None:
        link = self._state.link
        if link is not None:
            link.mark_rotation(begins)

"""Life of one instance: whether it runs, whether it has its memory, and what went wrong.

The state has one lock. Each child process has a watcher thread, which notes what happens to the process and notifies
the threads that wait for a change.
"""

from __future__ import annotations

import logging
import threading
import time
from enum import StrEnum

from hbserve.config import Config, InstanceConfig
from hbserve.errors import StartupError
from hbserve.messages.supervisor import EventKind, ReportEvent
from hbserve.process.parent import RestartBudget
from hbserve.semi_pd.resident_process_manager import ResidentGroup
from hbserve.semi_pd.scheduler_link import SchedulerLink

logger = logging.getLogger(__name__)

_LOSS_TIMEOUT_S = 10.0


class Lifecycle(StrEnum):
    """Life of an instance; `NEXT_LIFECYCLES` has the legal transitions."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


NEXT_LIFECYCLES = {
    Lifecycle.STOPPED: {Lifecycle.STARTING},
    Lifecycle.STARTING: {Lifecycle.RUNNING, Lifecycle.STOPPING},
    Lifecycle.RUNNING: {Lifecycle.STOPPING},
    Lifecycle.STOPPING: {Lifecycle.STOPPING, Lifecycle.STOPPED},
}


class InstanceLife:
    """Lifecycle, memory and errors of an instance. Base of `InstanceState`, which adds the workers.

    Only its methods change it. They take the lock themselves unless they say otherwise.

    Attributes:
        residents: the resident processes.
        changed: notified after every change; its lock protects the state.
        lifecycle: of the instance.
        is_told_to_stop: nothing new may begin.
        link: to the scheduler; None: no scheduler learns of the workers.
        memory_lost: why the memory is lost, until a recovery begins; None if it is there.
        given_up: why the instance is not recovered any more.
        last_error: the latest error.
    """

    def __init__(self, config: Config, instance: InstanceConfig) -> None:
        self._config = config
        self.instance = instance
        self.residents = ResidentGroup(config, instance, self.on_memory_lost, lambda: self.is_told_to_stop)
        self.changed = threading.Condition(threading.RLock())
        self.lifecycle = Lifecycle.STOPPED
        self.is_told_to_stop = False
        self.link: SchedulerLink | None = None
        self.memory_lost: str | None = None
        self.given_up: str | None = None
        self.last_error: str | None = None
        self._restarts = RestartBudget(config.rpc.max_restarts)

    # --- lifecycle ---------------------------------------------------------------------------------

    def enter(self, lifecycle: Lifecycle) -> None:
        """Change the lifecycle. With the lock held."""
        assert lifecycle in NEXT_LIFECYCLES[self.lifecycle], f"{self.lifecycle} -> {lifecycle}"
        self.lifecycle = lifecycle
        self.changed.notify_all()

    def tell_to_stop(self) -> None:
        """Let nothing new begin, and make a running start give up. Does not block."""
        with self.changed:
            self.is_told_to_stop = True
            self.changed.notify_all()
        self.residents.notify_cancelled()

    def check_going(self) -> None:
        """Check that the instance may go on.

        Raises:
            StartupError: if it was told to stop.
        """
        if self.is_told_to_stop:
            raise StartupError(f"{self.instance.instance_id} was told to stop")

    def may_try_again(self) -> bool:
        """Count a restart of a lost process; returns whether ``rpc.max_restarts`` allows it."""
        return self._restarts.take()

    # --- errors ------------------------------------------------------------------------------------

    def on_error(self, kind: EventKind, error: str, subject: str | None = None) -> None:
        """Log an error, keep it for the status, and report it to the scheduler as an event.

        Args:
            subject: default: the instance.
        """
        self.last_error, subject = error, subject or self.instance.instance_id
        logger.error("%s: %s: %s", kind, subject, error)
        self._report(kind, subject, error)

    def on_recovered(self, text: str) -> None:
        """Log the end of a recovery, and report it to the scheduler as an event."""
        logger.warning("recovered: %s: %s", self.instance.instance_id, text)
        self._report("recovered", self.instance.instance_id, text)

    def _report(self, kind: EventKind, subject: str, text: str) -> None:
        if self.link is not None:
            self.link.send(ReportEvent(kind=kind, subject=subject, text=text))

    # --- memory ------------------------------------------------------------------------------------

    def start_memory(self, deadline: float) -> None:
        """Start the resident processes.

        Raises:
            StartupError: with the reason of the process that cannot start; or if told to stop.
        """
        self.check_going()
        self.residents.start(max(0.0, deadline - time.monotonic()))

    def is_serving(self) -> bool:
        """Whether the instance runs and has its memory. With the lock held."""
        return self.lifecycle is Lifecycle.RUNNING and self.memory_lost is None

    def await_loss(self) -> None:
        """Wait until the loss of the memory is noted, if a resident process has ended: its workers may notice first."""
        if not self.residents.is_healthy():
            with self.changed:
                self.changed.wait_for(lambda: self.memory_lost is not None or self.is_told_to_stop, _LOSS_TIMEOUT_S)

    def on_memory_lost(self, why: str) -> None:
        """Note that a resident process has ended, or the device has failed."""
        with self.changed:
            if self.is_serving():
                self.memory_lost = self.last_error = why
            self.changed.notify_all()

    def on_restart_failed(self, error: str) -> None:
        """Let the supervisor try again, as long as ``rpc.max_restarts`` allows."""
        with self.changed:
            if self.lifecycle is not Lifecycle.RUNNING:
                return
            if self.may_try_again():
                self.memory_lost = error
            else:
                self.given_up = f"the memory cannot be loaded again, after rpc.max_restarts tries: {error}"
                self.on_error("given_up", self.given_up)

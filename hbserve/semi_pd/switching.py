"""The two halves of a change of split (arXiv 2504.19867, section 4.3), each with its state to look at.

*Delayed*: the new processes are prepared while the old ones serve; the new split begins when they are
ready, or not at all. *Asynchronous*: each phase changes over on its own, at the end of a step of its own,
so that there is always a worker for each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hbserve.config import InstanceRole

logger = logging.getLogger(__name__)


class Process(Protocol):
    """What is asked of a process here; `multiprocessing.Process` has it too."""

    def is_alive(self) -> bool:
        """Whether it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def join(self, timeout: float | None = None) -> Any:
        """Wait for its end."""


class DelayedSwitchingController:
    """Runs a preparation in the background and says when it is done.

    Args:
        preparation_timeout: seconds; a preparation that takes longer has failed.
    """

    def __init__(self, preparation_timeout: float = 30.0) -> None:
        self.preparation_timeout = preparation_timeout
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._state = "idle"
        self._error: str | None = None
        self._result: Any = None
        self._started = 0.0
        self._seconds: float | None = None
        self._num_prepared = self._num_failed = 0

    def request_delayed_switch(self, preparation_callback: Callable[[], Any]) -> bool:
        """Start a preparation; False if one is running.

        Args:
            preparation_callback: called in a thread. What it returns is the `result`; False, or an
                exception, is a failure.
        """
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return False
            self._state, self._error, self._result = "preparing", None, None
            self._started, self._seconds = time.monotonic(), None
            self._thread = threading.Thread(
                target=self._prepare, args=(preparation_callback,), name="semi-pd-prepare", daemon=True
            )
            self._thread.start()
        return True

    def _prepare(self, callback: Callable[[], Any]) -> None:
        error = None
        try:
            result = callback()
            if result is False:
                error = "the preparation said no"
        except Exception as raised:
            result, error = None, str(raised) or repr(raised)
        with self._lock:
            self._seconds = time.monotonic() - self._started
            if self._state != "preparing":
                return  # too late: it has been given up
            self._result, self._error = result, error
            self._state = "ready" if error is None else "failed"
            self._num_prepared += error is None
            self._num_failed += error is not None

    def wait_for_switch_ready(self, timeout: float | None = None) -> bool:
        """Wait for the preparation; False if it failed or was not ready in time, and then it is given up.

        Args:
            timeout: seconds; default: what is left of `preparation_timeout`.
        """
        thread = self._thread
        if thread is None:
            return False
        left = self._started + self.preparation_timeout - time.monotonic()
        thread.join(max(0.0, left if timeout is None else timeout))
        with self._lock:
            if self._state == "preparing":
                self._state = "failed"
                self._error = f"not ready within {self.preparation_timeout:g} s"
                self._num_failed += 1
            return self._state == "ready"

    @property
    def result(self) -> Any:
        """What the last preparation returned."""
        return self._result

    @property
    def error(self) -> str | None:
        """Why the last preparation failed."""
        return self._error

    def get_status(self) -> dict[str, Any]:
        """``state`` (``idle``, ``preparing``, ``ready``, ``failed``), ``error``, seconds, and counts."""
        with self._lock:
            return {
                "state": self._state,
                "error": self._error,
                "preparation_timeout": self.preparation_timeout,
                "last_preparation_s": self._seconds,
                "prepared": self._num_prepared,
                "failed": self._num_failed,
            }


@dataclass
class _Switch:
    state: str = "draining"
    error: str | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    thread: threading.Thread | None = None


class AsynchronousSwitchingController:
    """Has each role change over on its own; the old process drains and ends by itself.

    Args:
        drain_timeout: seconds; an old process that has not ended by then is reported.
    """

    def __init__(self, drain_timeout: float = 60.0) -> None:
        self.drain_timeout = drain_timeout
        self._lock = threading.Lock()
        self._switches: dict[InstanceRole, _Switch] = {}
        self._num_switched = 0

    def start_asynchronous_switch(
        self,
        role: InstanceRole,
        old_process: Process | None,
        new_process: Process | None,
        iteration_complete_callback: Callable[[], Any],
    ) -> bool:
        """Begin to change a role over; False if it is changing already, or there is nobody to change to.

        Args:
            iteration_complete_callback: called in a thread; returns when the old process' last step
                has ended. False: it has not, and the old process is left alone.
        """
        with self._lock:
            running = self._switches.get(role)
            if running is not None and running.thread is not None and running.thread.is_alive():
                return False
            if new_process is None or not new_process.is_alive():
                return False
            switch = self._switches[role] = _Switch()
            switch.thread = threading.Thread(
                target=self._switch,
                args=(switch, role, old_process, iteration_complete_callback),
                name=f"semi-pd-switch-{role}",
                daemon=True,
            )
            switch.thread.start()
        return True

    def _switch(self, switch: _Switch, role: InstanceRole, old: Process | None, complete: Callable[[], Any]) -> None:
        error = None
        try:
            if complete() is False:
                error = f"the old worker was still busy after {self.drain_timeout:g} s"
            elif old is not None and old.is_alive():
                old.terminate()
                old.join(self.drain_timeout)
                if old.is_alive():
                    error = f"the old worker had not ended after {self.drain_timeout:g} s"
        except Exception as raised:
            error = str(raised) or repr(raised)
        if error is not None:
            logger.error("%s: %s", role, error)
        with self._lock:
            switch.seconds = time.monotonic() - switch.started
            switch.state, switch.error = ("switched", None) if error is None else ("failed", error)
            self._num_switched += error is None

    def wait_for_switch_completion(self, role: InstanceRole, timeout: float | None = None) -> bool:
        """Wait until a role has changed over; False if it has not in time, or failed to."""
        with self._lock:
            switch = self._switches.get(role)
        if switch is None:
            return False
        assert switch.thread is not None
        switch.thread.join(timeout)
        return switch.state == "switched"

    def get_status(self) -> dict[str, Any]:
        """By role ``state`` (``draining``, ``switched``, ``failed``), ``error`` and seconds; and a count."""
        with self._lock:
            roles = {
                str(role): {"state": switch.state, "error": switch.error, "seconds": switch.seconds}
                for role, switch in self._switches.items()
            }
            return {"roles": roles, "switched": self._num_switched}

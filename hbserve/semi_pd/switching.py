"""Records of the two halves of a change of split (arXiv 2504.19867, section 4.3).

*Delayed*: the new processes are prepared while the old ones serve; the new split begins when they are ready, or not at
all. *Asynchronous*: each phase changes over on its own, at the end of one of its steps, so that each phase always has a
worker.

A rotation does both halves in the supervisor's thread and records them here (`prepare`, `switch`); its order is that of
`hbserve.semi_pd.rotation`. A program with processes of its own gives callbacks to `request_delayed_switch` and
`start_asynchronous_switch`, which run them in a thread.
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
    """Process as the controllers need it; `multiprocessing.Process` is one."""

    def is_alive(self) -> bool:
        """Whether the process runs."""

    def terminate(self) -> None:
        """Ask the process to end."""

    def join(self, timeout: float | None = None) -> Any:
        """Wait for the end of the process."""


@dataclass
class _Attempt:
    """One preparation or change-over.

    Attributes:
        state: as `get_status` shows it.
        has_returned: its callback has, also where the attempt had been given up before.
    """

    state: str
    error: str | None = None
    result: Any = None
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    has_returned: threading.Event = field(default_factory=threading.Event)


class DelayedSwitchingController:
    """Record of preparations, one at a time.

    Args:
        preparation_timeout: seconds; a preparation that takes longer has failed.
    """

    def __init__(self, preparation_timeout: float = 30.0) -> None:
        self.preparation_timeout = preparation_timeout
        self._lock = threading.Lock()
        self._attempt = _Attempt("idle")
        self._attempt.has_returned.set()
        self._num_prepared = self._num_failed = 0

    def prepare(self, preparation_callback: Callable[[], Any]) -> bool:
        """Call a preparation here and now; returns whether it succeeded.

        Args:
            preparation_callback: what it returns is the `result`; False, or an exception, is a failure.
        """
        attempt = self._attempt = _Attempt("preparing")
        self._run(attempt, preparation_callback)
        return attempt.state == "ready"

    def request_delayed_switch(self, preparation_callback: Callable[[], Any]) -> bool:
        """Call a preparation in a thread, as `prepare` does; returns False if one is running."""
        with self._lock:
            if not self._attempt.has_returned.is_set():
                return False
            attempt = self._attempt = _Attempt("preparing")
        arguments = (attempt, preparation_callback)
        threading.Thread(target=self._run, args=arguments, name="semi-pd-prepare", daemon=True).start()
        return True

    def wait_for_switch_ready(self, timeout: float | None = None) -> bool:
        """Wait for the preparation; returns False if it failed. A preparation that is not ready in time is given up.

        Args:
            timeout: seconds; default: what is left of `preparation_timeout`.
        """
        attempt = self._attempt
        left = attempt.started + self.preparation_timeout - time.monotonic()
        attempt.has_returned.wait(max(0.0, left if timeout is None else timeout))
        self._end(attempt, f"not ready within {self.preparation_timeout:g} s")
        return attempt.state == "ready"

    def _run(self, attempt: _Attempt, callback: Callable[[], Any]) -> None:
        try:
            result = callback()
            self._end(attempt, "the preparation said no" if result is False else None, result)
        except Exception as raised:
            self._end(attempt, str(raised) or repr(raised))
        attempt.has_returned.set()

    def _end(self, attempt: _Attempt, error: str | None, result: Any = None) -> None:
        """Record the end of an attempt; only its first end counts."""
        with self._lock:
            if attempt.state != "preparing":
                return
            attempt.seconds = time.monotonic() - attempt.started
            attempt.state, attempt.error, attempt.result = "failed" if error else "ready", error, result
            self._num_prepared += error is None
            self._num_failed += error is not None

    @property
    def result(self) -> Any:
        """Return value of the last preparation."""
        return self._attempt.result

    @property
    def error(self) -> str | None:
        """Reason why the last preparation failed."""
        return self._attempt.error

    def get_status(self) -> dict[str, Any]:
        """``state`` (``idle``, ``preparing``, ``ready``, ``failed``), ``error``, seconds, and counts."""
        with self._lock:
            return {
                "state": self._attempt.state,
                "error": self._attempt.error,
                "preparation_timeout": self.preparation_timeout,
                "last_preparation_s": self._attempt.seconds,
                "prepared": self._num_prepared,
                "failed": self._num_failed,
            }


class AsynchronousSwitchingController:
    """Record of change-overs, one at a time for each role.

    Args:
        drain_timeout: seconds; an old process that has not ended by then is reported.
    """

    def __init__(self, drain_timeout: float = 60.0) -> None:
        self.drain_timeout = drain_timeout
        self._lock = threading.Lock()
        self._attempts: dict[InstanceRole, _Attempt] = {}
        self._num_switched = 0

    def switch(
        self, role: InstanceRole, iteration_complete_callback: Callable[[], Any], old_process: Process | None = None
    ) -> bool:
        """Change a role over here and now; returns whether the old process has drained and ended.

        Args:
            iteration_complete_callback: returns when the last step of the old process has ended. False: it has not,
                and the old process is left alone.
            old_process: to be ended then; None: the callback has ended it.
        """
        attempt = self._attempts[role] = _Attempt("draining")
        self._run(attempt, role, iteration_complete_callback, old_process)
        return attempt.state == "switched"

    def start_asynchronous_switch(
        self,
        role: InstanceRole,
        old_process: Process | None,
        new_process: Process | None,
        iteration_complete_callback: Callable[[], Any],
    ) -> bool:
        """Change a role over in a thread, as `switch` does.

        Returns:
            False if the role is changing already, or the new process does not run.
        """
        with self._lock:
            running = self._attempts.get(role)
            is_changing = running is not None and not running.has_returned.is_set()
            if is_changing or new_process is None or not new_process.is_alive():
                return False
            attempt = self._attempts[role] = _Attempt("draining")
        arguments = (attempt, role, iteration_complete_callback, old_process)
        threading.Thread(target=self._run, args=arguments, name=f"semi-pd-switch-{role}", daemon=True).start()
        return True

    def _run(
        self, attempt: _Attempt, role: InstanceRole, complete: Callable[[], Any], old_process: Process | None
    ) -> None:
        error = None
        try:
            if complete() is False:
                error = f"the old worker was still busy after {self.drain_timeout:g} s"
            elif old_process is not None and old_process.is_alive():
                old_process.terminate()
                old_process.join(self.drain_timeout)
                if old_process.is_alive():
                    error = f"the old worker had not ended after {self.drain_timeout:g} s"
        except Exception as raised:
            error = str(raised) or repr(raised)
        if error is not None:
            logger.error("%s: %s", role, error)
        with self._lock:
            attempt.seconds = time.monotonic() - attempt.started
            attempt.state, attempt.error = "failed" if error else "switched", error
            self._num_switched += error is None
        attempt.has_returned.set()

    def wait_for_switch_completion(self, role: InstanceRole, timeout: float | None = None) -> bool:
        """Wait until a role has changed over; returns False if it has not in time, or failed to."""
        attempt = self._attempts.get(role)
        return attempt is not None and attempt.has_returned.wait(timeout) and attempt.state == "switched"

    def get_status(self) -> dict[str, Any]:
        """By role ``state`` (``draining``, ``switched``, ``failed``), ``error``, ``seconds``; and a count."""
        with self._lock:
            roles = {
                str(role): {"state": attempt.state, "error": attempt.error, "seconds": attempt.seconds}
                for role, attempt in self._attempts.items()
            }
            return {"roles": roles, "switched": self._num_switched}

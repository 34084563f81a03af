"""A rotation: from one split to another while the service goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hbserve.config import InstanceRole
from hbserve.semi_pd.instance_state import InstanceState
from hbserve.semi_pd.switching import AsynchronousSwitchingController, DelayedSwitchingController
from hbserve.semi_pd.utils import PHASES
from hbserve.semi_pd.worker_pool import WorkerState
from hbserve.slo.constraints import SMAllocation

logger = logging.getLogger(__name__)


class Rotation:
    """Does one rotation after the other, and counts them.

    Args:
        mark: called with True when one begins and with False when it is over, however it ended: what
            is measured in between is not how the system is.

    Attributes:
        num_done, num_failed: rotations so far.
        last_s: what the last one took.
    """

    def __init__(
        self,
        state: InstanceState,
        delayed: DelayedSwitchingController,
        asynchronous: AsynchronousSwitchingController,
        mark: Callable[[bool], None],
    ) -> None:
        self._state, self._delayed, self._asynchronous, self._mark = state, delayed, asynchronous, mark
        self.num_done = self.num_failed = 0
        self.last_s: float | None = None

    def rotate(self, allocation: SMAllocation) -> None:
        """Prepare the workers of a split, and change over to them; if they do not get ready, nothing has changed."""
        started = time.monotonic()
        self._mark(True)
        try:
            if self._prepare(allocation, started + self._delayed.preparation_timeout):
                self._change_over(allocation)
        finally:
            self.last_s = time.monotonic() - started
            self._mark(False)

    def _prepare(self, allocation: SMAllocation, deadline: float) -> bool:
        state = self._state
        self._delayed.request_delayed_switch(lambda: state.prepare(allocation, deadline))
        if self._delayed.wait_for_switch_ready():
            return True
        self.num_failed += 1
        state.last_error = f"no rotation to {allocation}: {self._delayed.error}"
        logger.error("%s: %s", state.instance.instance_id, state.last_error)
        state.discard()
        return False

    def _change_over(self, allocation: SMAllocation) -> None:
        """One phase after the other, first the one that gives multiprocessors to the other.

        So shares that have none in common before and after have none on the way: a step of prefill may go on for long
        at the old worker, and would slow down all decode steps beside it that compute on some of the same.
        """
        state = self._state
        with state.changed:
            if not state.is_serving():
                return  # a recovery makes workers for whatever split is in force then
            before, state.allocation = state.allocation, allocation
            changes = [
                phase for phase in PHASES if state.levels_of(phase, before) != state.levels_of(phase, allocation)
            ]
            if len(changes) < len(PHASES):
                state.activate([phase for phase in PHASES if phase not in changes], "the shares change")
        changes.sort(key=lambda phase: allocation.share_of(phase) - before.share_of(phase))
        timeout = self._asynchronous.drain_timeout
        are_done = []
        for phase in changes:
            if not self._switch(phase, allocation):
                return
            are_done.append(self._asynchronous.wait_for_switch_completion(phase, 2 * timeout))
        if all(are_done):
            self.num_done += 1
        with state.changed:
            if state.is_serving():
                state.replace_lost()
        state.discard()  # what was to replace a worker of the old split that was lost meanwhile

    def _switch(self, phase: InstanceRole, allocation: SMAllocation) -> bool:
        """Name a phase's new workers to the scheduler and let the old ones drain; False if a recovery must."""
        state = self._state
        with state.changed:
            if not state.is_serving():
                return False
            assert state.pool is not None
            made = state.pool.at_level((phase, allocation.share_of(phase)))
            state.activate([phase])
            old = [
                worker
                for worker in state.pool.workers.values()
                if worker.state is WorkerState.DRAINING and worker.spec.role is phase
            ]

        def drained() -> bool:
            if state.link is None:
                for worker in old:
                    worker.process.terminate()
            deadline = time.monotonic() + self._asynchronous.drain_timeout
            done = [worker.process.join(max(0.0, deadline - time.monotonic())) for worker in old]
            if all(done):
                return True
            for worker, ended in zip(old, done, strict=True):
                if not ended:
                    worker.process.kill()
            return False

        self._asynchronous.start_asynchronous_switch(phase, None, made[-1].process if made else None, drained)
        return True

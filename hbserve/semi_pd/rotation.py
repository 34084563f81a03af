"""A rotation: from one split to another while the instance serves.

Runs in the supervisor's thread of `hbserve.semi_pd.process_rotation_manager`. One rotation, in order:

1. `Rotation.rotate` marks its beginning: the scheduler leaves the latencies until its end out of windows.
2. `InstanceState.prepare` starts the workers that the new split lacks, and waits until all are ready, while the old
   workers serve. If one fails or is late, `InstanceState.discard` ends the new ones, and the old split stays.
3. `_put_in_force` makes it the split in force, and tells the scheduler the share of a phase that keeps its workers.
4. For each phase that changes, first the one that shrinks: `_activate` names its new workers to the scheduler, which
   plans no more steps for the old ones; `_drain` waits until the old ones have ended.
5. `InstanceState.replace_lost` starts workers in place of those lost meanwhile, and `discard` ends unneeded ones.
6. `rotate` marks the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from hbserve.config import InstanceRole
from hbserve.semi_pd.instance_state import InstanceState
from hbserve.semi_pd.switching import AsynchronousSwitchingController, DelayedSwitchingController
from hbserve.semi_pd.utils import PHASES
from hbserve.semi_pd.worker_pool import Worker, WorkerState
from hbserve.slo.constraints import SMAllocation


class Rotation:
    """Rotations of one instance, one at a time, and their counts.

    Args:
        mark: called with True when a rotation begins and with False when it ends, in success or failure. Latencies
            measured in between say nothing about either split.

    Attributes:
        num_done, num_failed: rotations so far.
        last_s: duration of the last one.
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

    def rotate(self, allocation: SMAllocation) -> bool:
        """Change to a split; if its workers do not get ready, the split in force stays.

        Returns:
            False if the memory was lost before the split was in force: a recovery comes first, and then another try.
        """
        started = time.monotonic()
        self._mark(True)
        try:
            if self._prepare(allocation, started + self._delayed.preparation_timeout):
                self._switch_over(allocation)
            return self._state.is_settled(allocation)
        finally:
            self.last_s = time.monotonic() - started
            self._mark(False)

    def _prepare(self, allocation: SMAllocation, deadline: float) -> bool:
        state = self._state
        if self._delayed.prepare(lambda: state.prepare(allocation, deadline)):
            return True
        state.await_loss()
        if state.is_settled(allocation):
            self.give_up(allocation, self._delayed.error or "its workers were not ready")
        state.discard()
        return False

    def give_up(self, allocation: SMAllocation, why: str) -> None:
        """Record a rotation that does not take place."""
        self.num_failed += 1
        self._state.on_error("rotation_failed", f"no rotation to {allocation}: {why}")

    def _switch_over(self, allocation: SMAllocation) -> None:
        state = self._state
        phases = self._put_in_force(allocation)
        if phases is None:
            return
        have_drained = []
        for phase in phases:
            old = self._activate(phase, allocation)
            if old is None:
                return
            have_drained.append(self._asynchronous.switch(phase, functools.partial(self._drain, old)))
        self.num_done += all(have_drained)
        with state.changed:
            if state.is_serving():
                state.replace_lost()
        state.discard()  # workers that were to replace lost ones of the old split

    def _put_in_force(self, allocation: SMAllocation) -> list[InstanceRole] | None:
        """Make this the split in force; returns the phases that must change workers, in order, or None while the memory
        is lost: the recovery starts workers for the split in force then.

        The phase that gives multiprocessors to the other one comes first. So shares that have none in common before and
        after have none in between: a long prefill step at the old worker would slow down the decode steps beside it.
        """
        state = self._state
        with state.changed:
            if not state.is_serving():
                return None
            before = state.replace_split(allocation)
            changes = [
                phase for phase in PHASES if state.levels_of(phase, before) != state.levels_of(phase, allocation)
            ]
            if len(changes) < len(PHASES):
                state.activate([phase for phase in PHASES if phase not in changes], "the shares change")
        return sorted(changes, key=lambda phase: allocation.share_of(phase) - before.share_of(phase))

    def _activate(self, phase: InstanceRole, allocation: SMAllocation) -> list[Worker] | None:
        """Name a phase's new workers to the scheduler; returns the old ones, or None while the memory is lost."""
        state = self._state
        with state.changed:
            if not state.is_serving():
                return None
            assert state.pool is not None
            state.activate([phase])
            if not state.pool.at_level((phase, allocation.share_of(phase))):
                state.replace_lost()  # the new worker has been lost since it was ready
            workers = state.pool.workers.values()
            return [w for w in workers if w.state is WorkerState.DRAINING and w.spec.role is phase]

    def _drain(self, old: list[Worker]) -> bool:
        """Wait until workers have ended, and kill those that have not in time; returns whether none was killed."""
        if self._state.link is None:  # no scheduler tells them to end
            for worker in old:
                worker.process.terminate()
        deadline = time.monotonic() + self._asynchronous.drain_timeout
        late = [worker for worker in old if not worker.process.join(max(0.0, deadline - time.monotonic()))]
        for worker in late:
            worker.process.kill()
        return not late

"""A scheduler that makes its plans at any time while the step before is under way, or when that has ended."""

from __future__ import annotations

import math
import random

from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.step_time_predictor import StepWork
from hbserve.scheduler.instance import InstanceHandle
from tests.support.eager_drafts import EagerDrafts

LONGEST_WAIT_S = 4e-3  # steps of the tests' models take about as long


class _AnyTiming(DispatchTimer):
    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(7)
        self._plan_at: float | None = None

    def wait_s(self, now: float) -> float:
        if not self._steps:
            return 0.0
        if self._plan_at is None:
            self._plan_at = now + self._random.uniform(0.0, LONGEST_WAIT_S)
        return max(0.0, self._plan_at - now)

    def on_planned(
        self, work: StepWork | None, now: float, not_before: float = -math.inf, num_passes: int = 0, rounds: int = 1
    ) -> None:
        super().on_planned(work, now, not_before, num_passes, rounds)
        self._plan_at = None


class Dawdler(EagerDrafts):
    """Whenever plans are made, the answers are the same."""

    def _fill_pipelines(self, instance: InstanceHandle) -> None:
        for worker in instance.workers.values():
            if type(worker.timing) is DispatchTimer and not worker.inflight:
                worker.timing = _AnyTiming()
        super()._fill_pipelines(instance)

"""When a worker's next plan is made: as late as it is surely there in time.

A plan that is made when the step before it begins cannot have in it what comes meanwhile: after a long step that
is a long wait. So a worker's steps are timed, and while one is expected to go on for a while the next one is not yet
planned. How long steps take, and how long before its predecessor's end a plan must leave, are both learnt from the
worker's own steps. Nothing hangs on it: whoever waits is woken by the end of the step before, too, and a step that
comes too late costs the device the way of a plan, about a millisecond or two.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork

_NUM_SAMPLES = 64
_NUM_LATE = 3
"""Of so many steps, this many may be a little late: the device waits for them."""
_MIN_SAMPLES = 16
_MIN_LEAD_S = 3e-3
_SHORTEST_WAIT_S = 1e-3
"""Timers are no finer; with the least lead, steps below 4 ms are all planned at once."""


@dataclass(slots=True)
class _Step:
    """One that is in flight; ``begin``: when that was expected to be, None if its plan came to an idle worker."""

    work: StepWork | None
    seconds: float
    planned_at: float
    begin: float | None


class DispatchTimer:
    """One worker's steps in flight, and how long the next plan may wait.

    Time is passed in, in seconds of any clock. The *lead* is how long before a step's expected end the next plan is
    made. Each step tells by how much it came early or late, so what lead would have been just enough; the lead is what
    would have been for all of the last steps but a few. That covers whatever makes plans late: scheduling, the way
    and the preparation on the worker, and predictions that are wrong.

    Args:
        predecessor: of a worker that did the same; how late plans may leave is taken from there, since that is more
            the host's than the worker's. How long steps take is not: its share of the device may be another.

    Attributes:
        forecast: of the worker's steps, as far as they have been seen.
    """

    def __init__(self, predecessor: DispatchTimer | None = None) -> None:
        self.predictor = StepTimePredictor()
        self._steps: deque[_Step] = deque()
        self._needed_leads_s: deque[float] = deque(
            () if predecessor is None else predecessor._needed_leads_s, maxlen=_NUM_SAMPLES
        )
        self._last_end = float("-inf")
        self._due: float | None = None
        self._overtaken: float | None = None

    @property
    def num_samples(self) -> int:
        """Steps that the lead has been learnt from, of those that still count."""
        return len(self._needed_leads_s)

    def wait_s(self, now: float) -> float:
        """How much later the next plan is early enough; 0: make it now."""
        end = self.expected_end()
        if end is None or len(self._needed_leads_s) < _MIN_SAMPLES or end - now < _MIN_LEAD_S + _SHORTEST_WAIT_S:
            return 0.0
        lead_s = max(_MIN_LEAD_S, sorted(self._needed_leads_s)[-_NUM_LATE] + _SHORTEST_WAIT_S)
        wait_s = end - lead_s - now
        if wait_s < _SHORTEST_WAIT_S:
            return 0.0
        self._due = end - lead_s
        return wait_s

    def on_planned(self, work: StepWork | None, now: float, not_before: float = -math.inf) -> None:
        """A plan is on its way.

        Args:
            work: None where nobody can tell how long it takes.
            not_before: when another worker's step is expected to end that this one waits for.
        """
        seconds = 0.0 if work is None else self.predictor.seconds(work)
        # A plan that had waited, and then was made late, is late by the fault of whoever makes plans.
        planned_at = now if self._due is None else min(now, self._due)
        begin = self.expected_end()
        if begin is None and now - self._last_end < _MIN_LEAD_S:
            begin = self._overtaken
        if not_before > now:
            planned_at, begin = not_before, None  # how early it comes, this worker's device cannot tell
        self._steps.append(_Step(work, seconds, planned_at, begin))
        self._due = self._overtaken = None

    def on_confirmed(self, now: float, busy_s: float, early_s: float) -> None:
        """The oldest step in flight has ended; what it reported, as in `StepResult`."""
        # What a plan still waits for may be over already: the expected end tells by how much that was wrong.
        self._overtaken = None if self._due is None else self.expected_end()
        step = self._steps.popleft()
        self._last_end, self._due = now, None
        if step.begin is not None:
            self._needed_leads_s.append(step.begin - step.planned_at - early_s)
        if step.work is not None and busy_s > 0:
            self.predictor.observe(step.work, busy_s)

    def expected_end(self) -> float | None:
        """Of all that is in flight; None if nothing is, or nobody can tell."""
        if not self._steps or any(not step.seconds for step in self._steps):
            return None
        return max(self._last_end, self._steps[0].planned_at) + sum(step.seconds for step in self._steps)

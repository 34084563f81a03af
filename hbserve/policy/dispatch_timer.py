"""The time at which a worker's next plan is made: as late as possible, but in time for the device.

Runs in the scheduler's process, and on the simulator's clock. A plan that is made at the start of the step before it
cannot include requests that arrive during that step; after a long step they have waited long. So the scheduler times a
worker's steps, and does not plan the next one while the current one is expected to go on for a while.

The timer learns from the worker's own steps how long they take (`StepTimePredictor`), and how long before the end of
a step the next plan must leave. An error is cheap: the end of a step wakes the scheduler too, and a late plan leaves
the device idle for one plan's travel, a millisecond or two.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork

_NUM_SAMPLES = 64
_NUM_LATE = 3
"""Steps of the last `_NUM_SAMPLES` that may come a little late; the device waits for them."""
_MIN_SAMPLES = 16
_MIN_LEAD_S = 3e-3
_FIRST_GAP_S = 1e-3
_FIRST_ROUND_GAP_S = 0.3e-3
_MAX_GAP_S = 0.1
_GAP_RATE, _SMALLER_GAP_RATE = 0.3, 0.1
_DRAFT_RATE, _FASTER_DRAFT_RATE = 0.1, 0.5
_GAP_FADING = 0.9998
"""Factor on the gap for each step that does not show it: a gap that seemed long is measured anew now and then."""
_SHORTEST_WAIT_S = 1e-3
"""Resolution of timers. With the shortest lead, steps below 4 ms are all planned at once."""


class _Step(msgspec.Struct, eq=False):
    """A step in flight.

    Attributes:
        begin: when it was expected to begin; None if its plan came to an idle worker.
        after_result: its plan was made as soon as the last result came, and not before.
        is_repeated: it has done a round and does another one.
    """

    work: StepWork | None
    seconds: float
    planned_at: float
    begin: float | None
    after_result: bool = False
    is_repeated: bool = False


class DispatchTimer:
    """Timer of one worker's plans, over its steps in flight.

    Time is passed in, in seconds of any clock. The *lead* is the time from a plan to the expected end of the step
    before it. Each step reports how early its plan came, and so which lead would have been just enough for it. The
    timer uses a lead that was enough for nearly all of the last `_NUM_SAMPLES` steps; `_NUM_LATE` of them may be late.
    That lead covers every cause of late plans: scheduling, travel, preparation on the worker, and wrong predictions.

    Args:
        predictor: of the worker's step times; the timer teaches it. None: one that knows nothing.
        predecessor: timer of a worker of the same phase. Its lead is taken over, because the lead depends on the host
            more than on the worker. Its step times are not: the share of the device may differ.

    Attributes:
        gap_s: time that the device idles between two steps if the plan of the second waits for the first one's result.
        round_gap_s: the same between two rounds of a step, which wait for no plan.
        draft_s: time of a forward pass of the draft model; 0: none has been seen.
        read_s: time in which it reads what it has missed of some sequences; 0: that has not been seen.
    """

    def __init__(self, predictor: StepTimePredictor | None = None, predecessor: DispatchTimer | None = None) -> None:
        self.predictor = predictor or StepTimePredictor()
        self.gap_s: float = _FIRST_GAP_S if predecessor is None else predecessor.gap_s
        self.round_gap_s = _FIRST_ROUND_GAP_S
        self.draft_s: float = 0.0 if predecessor is None else predecessor.draft_s
        self.read_s: float = 0.0 if predecessor is None else predecessor.read_s
        self._steps: deque[_Step] = deque()
        self._needed_leads_s: deque[float] = deque(
            () if predecessor is None else predecessor._needed_leads_s, maxlen=_NUM_SAMPLES
        )
        self._lead_s: float | None = None  # to be computed from the needed ones
        self._last_end = float("-inf")
        self._due: float | None = None
        self._overtaken: float | None = None

    @property
    def num_samples(self) -> int:
        """Number of steps that the lead is computed from."""
        return len(self._needed_leads_s)

    def wait_s(self, now: float) -> float:
        """Compute how long the next plan may wait; 0: make it now."""
        end = self.expected_end()
        if end is None or len(self._needed_leads_s) < _MIN_SAMPLES or end - now < _MIN_LEAD_S + _SHORTEST_WAIT_S:
            return 0.0
        if self._lead_s is None:
            self._lead_s = max(_MIN_LEAD_S, sorted(self._needed_leads_s)[-_NUM_LATE] + _SHORTEST_WAIT_S)
        wait_s = end - self._lead_s - now
        if wait_s < _SHORTEST_WAIT_S:
            return 0.0
        self._due = end - self._lead_s
        return wait_s

    def on_planned(
        self,
        work: StepWork | None,
        now: float,
        not_before: float = -math.inf,
        num_passes: int = 0,
        rounds: int = 1,
    ) -> None:
        """Note that a plan has been sent.

        Args:
            work: None if its duration cannot be predicted.
            not_before: expected end of the step of another worker that this one waits for.
            num_passes: forward passes of the draft model before the step.
            rounds: how often it may be done.
        """
        seconds = 0.0 if work is None else self.predictor.seconds(work)
        if seconds:
            seconds = rounds * (seconds + num_passes * self.draft_s)
        # If the scheduler made a plan later than this timer said, the lead is not to blame.
        planned_at = now if self._due is None else min(now, self._due)
        begin = self.expected_end()
        if begin is None and now - self._last_end < _MIN_LEAD_S:
            begin = self._overtaken
        if not_before > now:
            planned_at, begin = not_before, None  # this worker cannot tell how early its plan comes
        after_result = not self._steps and now == self._last_end
        self._steps.append(_Step(work, seconds, planned_at, begin, after_result))
        self._due = self._overtaken = None

    def on_round(self, now: float, busy_s: float, early_s: float, draft_s: float = 0.0) -> None:
        """Note that a round of the oldest step in flight has ended, and another one has begun."""
        step = self._steps[0]
        self._note_gap(step, now, busy_s + draft_s, early_s)
        step.is_repeated = True
        if step.work is not None and busy_s > 0:
            self.predictor.observe(step.work, busy_s)

    def _note_gap(self, step: _Step, now: float, busy_s: float, early_s: float) -> None:
        idle_s = min(-early_s, _MAX_GAP_S)
        if step.is_repeated:
            self.round_gap_s += _SMALLER_GAP_RATE * (max(idle_s, 0.0) - self.round_gap_s)
        elif step.after_result and idle_s > 0:
            # the worker does not see all of it: results are on their way, too
            idle_s = min(max(idle_s, now - step.planned_at - busy_s), _MAX_GAP_S)
            self.gap_s += (_GAP_RATE if idle_s > self.gap_s else _SMALLER_GAP_RATE) * (idle_s - self.gap_s)
        else:
            self.gap_s *= _GAP_FADING

    def on_confirmed(self, now: float, busy_s: float, early_s: float, draft_s: float = 0.0) -> None:
        """Note that the oldest step in flight has ended.

        Args:
            busy_s, early_s, draft_s: as in its `StepResult`, but ``busy_s`` without ``draft_s``.
        """
        # If a plan still waits for this end, the expected end says by how much the prediction was wrong.
        self._overtaken = None if self._due is None else self.expected_end()
        step = self._steps.popleft()
        self._last_end, self._due = now, None
        if step.begin is not None:
            self._needed_leads_s.append(step.begin - step.planned_at - early_s)
            self._lead_s = None
        self._note_gap(step, now, busy_s + draft_s, early_s)
        if step.work is not None and busy_s > 0:
            self.predictor.observe(step.work, busy_s)

    def on_drafted(self, seconds: float) -> None:
        """Note how long a forward pass of the draft model took in a step; 0: there was none."""
        if not seconds or not self.draft_s:
            self.draft_s = seconds or self.draft_s * _GAP_FADING
        else:  # a slow pass may have been the first of its size, which loads kernels
            rate = _DRAFT_RATE if seconds > self.draft_s else _FASTER_DRAFT_RATE
            self.draft_s += rate * (seconds - self.draft_s)

    def on_read(self, seconds: float, num_passes: int) -> None:
        """Note how long a draft model has worked in a step in which it read first; ``num_passes``: for guesses."""
        read_s = max(seconds - self.draft_s * max(num_passes - 1, 0), 0.0)  # the pass that reads makes the first guess
        self.read_s += (_DRAFT_RATE if self.read_s else 1.0) * (read_s - self.read_s)

    def expected_end(self) -> float | None:
        """When all steps in flight should have ended; None if none is in flight, or one cannot be predicted."""
        if not self._steps:
            return None
        end = max(self._last_end, self._steps[0].planned_at)
        for step in self._steps:
            if not step.seconds:
                return None
            end += step.seconds
        return end

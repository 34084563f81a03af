"""A prefill worker and a decode worker, step by step, on the simulated clock.

The rules are the scheduler's (`hbserve.scheduler.step_planner`): prompts in its policy's order, each with
one chunk per step up to the step's budget; all decoding sequences in every decode step. Decode steps of
an unchanged batch are one event, a *burst*.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.mixed_step_budget import slack_s
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.simulate.clock import Event, Progress, SimulatedClock
from hbserve.simulate.prompts import Chunks, Prompts, Sizes
from hbserve.simulate.requests import SimulatedRequest

_MAX_BURST_STEPS = 64  # the context grows during a burst
PLAN_DELAY_S = 2e-3  # from a decision to a step that is ready on the device
_ROUND_TRIP_S = 1e-3  # of a result and the next plan, where that is a small one


class PlanAhead:
    """The next step of a worker, planned while one is running.

    It is planned as late as the scheduler plans it: the scheduler's own `DispatchTimer` sets the time.

    Args:
        pump: called when it is time to plan.

    Attributes:
        chunks: prompts of the planned step; None: no step is planned.
    """

    def __init__(self, clock: SimulatedClock, pump: Callable[[], None]) -> None:
        self._clock, self._pump = clock, pump
        self._timer = DispatchTimer()
        self._planned_at: deque[float] = deque()
        self._alarm: Event | None = None
        self.chunks: Chunks | None = None

    @property
    def predictor(self) -> StepTimePredictor:
        """Predictor of step times, from the steps so far."""
        return self._timer.predictor

    def is_due(self) -> bool:
        """Return whether to plan now. If it is too early, `pump` is called later."""
        if self.chunks is not None:
            return False
        if self._alarm is not None:
            self._alarm.cancel()
        wait_s = self._timer.wait_s(self._clock.now)
        if wait_s > 0:
            self._alarm = self._clock.at(self._clock.now + wait_s, self._pump)
        return not wait_s

    def on_planned(self, work: StepWork) -> None:
        """Note that a step has been planned, for now or for later."""
        self._timer.on_planned(work, self._clock.now)
        self._planned_at.append(self._clock.now)

    def on_ended(self, began: float, seconds: float) -> None:
        """Note that the oldest step has ended; ``seconds`` is 0 if it was empty."""
        self._timer.on_confirmed(self._clock.now, seconds, began - self._planned_at.popleft() - PLAN_DELAY_S)


class PrefillPhase:
    """A worker that computes prompts.

    Args:
        on_computed: called with each request whose prompt is complete.
        pump: called after each step, to start the next one.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimePredictor,
        sizes: Sizes,
        on_computed: Callable[[SimulatedRequest], None],
        pump: Callable[[], None],
    ) -> None:
        self._clock, self._steps, self._sizes = clock, steps, sizes
        self._on_computed, self._pump = on_computed, pump
        self.prompts = Prompts(clock, sizes)
        self.percentage = 100
        self.step: Progress | None = None
        self.chunks: Chunks | None = None
        self._plans: dict[int, PlanAhead] = {}  # of the worker at each percentage
        self._last_end = -math.inf
        self.last_busy_s = 0.0

    def start(self, percentage: int) -> None:
        """Begin a step at a share of the device. A planned step is at the worker of the step before already."""
        is_other_worker = self.percentage != percentage and self._last_end == self._clock.now
        self.percentage = percentage
        self.chunks = chunks = self._ahead.chunks or self._take()
        self._ahead.chunks = None
        seconds = self._steps.at(percentage).seconds(chunks.work)
        # Another worker gets its plan only when the worker before has ended.
        self.step = Progress(self._clock, seconds + is_other_worker * PLAN_DELAY_S, self._on_done)

    @property
    def _ahead(self) -> PlanAhead:
        """Plan of the current worker; each worker times its own steps."""
        return self._plans.setdefault(self.percentage, PlanAhead(self._clock, self._pump))

    @property
    def has_planned(self) -> bool:
        """Whether the next step is at the worker already."""
        return self._ahead.chunks is not None

    def plan_ahead(self, percentage: int) -> None:
        """Plan the next step shortly before the running one ends; later prompts wait for both.

        Args:
            percentage: share of the next step. A step of another worker is not planned before this one has ended.
        """
        has_more = self.prompts.num_unplanned_tokens > 0
        if self.step is not None and percentage == self.percentage and has_more and self._ahead.is_due():
            self._ahead.chunks = self._take()

    def _take(self) -> Chunks:
        chunks = self.prompts.take(self._sizes.max_chunk_prefill_tokens)
        self._ahead.on_planned(chunks.work)
        return chunks

    def _on_done(self) -> None:
        assert self.step is not None
        assert self.chunks is not None
        self._last_end = self._clock.now
        self.last_busy_s = self._clock.now - self.step.started
        self._ahead.on_ended(self.step.started, self.last_busy_s)
        self.step, chunks = None, self.chunks
        for request in self.prompts.on_computed(chunks, chunks.work, self.last_busy_s):
            self._on_computed(request)
        self._pump()


class DecodePhase:
    """A worker that decodes all its sequences in lockstep.

    Args:
        on_stepped: called after a burst with its steps, the sequences and the seconds.
        on_finished: called with each request that has all its tokens.
        pump: called after that, to start the next burst.

    Attributes:
        alone_s: time of a step of the last burst if no prefill runs beside it.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimePredictor,
        on_stepped: Callable[[int, int, float], None],
        on_finished: Callable[[SimulatedRequest], None],
        pump: Callable[[], None],
    ) -> None:
        self._clock, self._steps = clock, steps
        self._on_stepped, self._on_finished, self._pump = on_stepped, on_finished, pump
        self.percentage = 100
        self.burst: Progress | None = None
        self._last_end = -math.inf
        self._step_s = self.alone_s = 0.0
        self._num_steps = 0
        self._by_end: list[tuple[int, int, SimulatedRequest]] = []
        self._count = 0
        self._context = 0  # summed over the running sequences
        self._joining: list[tuple[SimulatedRequest, int]] = []

    @property
    def num_sequences(self) -> int:
        """Sequences that run or join."""
        return len(self._by_end) + len(self._joining)

    def min_slack_s(self, target_s: float, interval_s: float) -> float:
        """Return the smallest slack of its sequences; see `hbserve.policy.mixed_step_budget.slack_s`."""
        now, ends = self._clock.now, [(request, end - self._num_steps) for end, _, request in self._by_end]
        slacks = (
            slack_s(now, request.first_token_time or now, request.output_tokens - 1, left, target_s, interval_s)
            for request, left in [*ends, *self._joining]
        )
        return min(slacks, default=math.inf)

    def join(self, request: SimulatedRequest, left: int) -> None:
        """Add a sequence whose prompt is computed. It takes part from the next step, for ``left`` steps."""
        self._joining.append((request, left))
        self.end_burst_at_step()

    def leave(self) -> dict[SimulatedRequest, int]:
        """Remove all sequences between two bursts; return them with the steps that each still needs."""
        assert self.burst is None
        left = {request: end - self._num_steps for end, _, request in sorted(self._by_end)} | dict(self._joining)
        self._by_end.clear()
        self._joining.clear()
        self._context = 0
        return left

    def end_burst_at_step(self) -> None:
        """End the burst with its current step, because something has changed."""
        if self.burst is not None:
            done = int(self.burst.done_s / self._step_s + 1e-9)
            self.burst.shorten(min(self.burst.total_s, (done + 1) * self._step_s))

    def start(self, percentage: int, max_steps: int = _MAX_BURST_STEPS, waits: bool = False) -> None:
        """Begin a burst at a share of the device.

        Args:
            waits: its plan could be made only when the step before had ended. This holds for another worker too.
        """
        is_late = self._last_end == self._clock.now and (percentage != self.percentage or waits)
        self.percentage = percentage
        for request, left in self._joining:
            self._count += 1
            request.finish_step = self._num_steps + left
            heapq.heappush(self._by_end, (request.finish_step, self._count, request))
            self._context += request.prompt_tokens + request.output_tokens - left
        self._joining.clear()
        batch = len(self._by_end)
        steps = min(max_steps, self._by_end[0][0] - self._num_steps)
        work = StepWork(batch, self._context + batch * steps / 2)
        self._step_s = self.alone_s = self._steps.at(percentage).seconds(work)
        if is_late:
            self._step_s += _ROUND_TRIP_S / steps
        self.burst = Progress(self._clock, steps * self._step_s, self._on_done)

    def _on_done(self) -> None:
        assert self.burst is not None
        steps, batch = round(self.burst.total_s / self._step_s), len(self._by_end)
        seconds = self._clock.now - self.burst.started
        self.burst = None
        self._last_end = self._clock.now
        self._num_steps += steps
        self._context += steps * batch
        self._on_stepped(steps, batch, seconds)
        while self._by_end and self._by_end[0][0] <= self._num_steps:
            request = heapq.heappop(self._by_end)[2]
            self._context -= request.prompt_tokens + request.output_tokens
            self._on_finished(request)
        self._pump()

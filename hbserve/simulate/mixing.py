"""A worker that mixes prompt chunks into its decode steps, on the simulated clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from hbserve.config.semi_pd import MIXED_PACE
from hbserve.policy.mixed_step_budget import MixedStepBudget, StepTimeBudget, slack_s
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.simulate.clock import Progress, SimulatedClock
from hbserve.simulate.phases import PlanAhead
from hbserve.simulate.prompts import Chunks, Prompts, Sizes
from hbserve.simulate.requests import SimulatedRequest


class MixedPhase:
    """A worker of both phases. It follows the scheduler's rules for such a worker.

    Args:
        prompts: prompts to compute.
        interval_s: mean time between decode steps that the TPOT target allows; 0: no limit.
        on_stepped: called after a step with its prompts, its decode rows, and seconds.
        on_computed: called with each request whose prompt is complete; returns whether it goes on to decode.
        on_finished: called with each request that has all its tokens.
        pump: called after each step, to start the next one.

    Attributes:
        running: decoding sequences, with the tokens still to come.
        step: the step that is running.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimePredictor,
        sizes: Sizes,
        prompts: Prompts,
        interval_s: float,
        on_stepped: Callable[[Chunks, int, float], None],
        on_computed: Callable[[SimulatedRequest], bool],
        on_finished: Callable[[SimulatedRequest], None],
        pump: Callable[[], None],
    ) -> None:
        self._clock, self._steps, self._sizes, self._prompts = clock, steps, sizes, prompts
        self._on_stepped, self._on_computed, self._on_finished, self._pump = on_stepped, on_computed, on_finished, pump
        self._interval_s, self._budget = interval_s, MixedStepBudget()
        self._ahead = PlanAhead(clock, pump)
        self._works: deque[StepWork] = deque()  # of the running and planned steps
        self._chunks: Chunks | None = None
        self.running: dict[SimulatedRequest, int] = {}
        self.step: Progress | None = None

    @property
    def has_planned(self) -> bool:
        """Whether the step after the running one is at the worker already."""
        return self._ahead.chunks is not None

    def plan_ahead(self) -> None:
        """Plan the next step shortly before the running one ends; later prompts wait for both."""
        has_work = self.running or self._prompts.num_unplanned_tokens
        if self.step is not None and has_work and self._ahead.is_due():
            self._ahead.chunks = self._take()

    def _take(self) -> Chunks:
        budget = min(self._sizes.max_num_batched_tokens - len(self.running), self._sizes.max_chunk_prefill_tokens)
        limit_s, time_budget = self._limit_s(budget), None
        batch, context = (0, 0) if limit_s == math.inf else (len(self.running), self._context)
        if batch and limit_s is not None:
            time_budget = StepTimeBudget(self._ahead.predictor, StepWork(batch, context), limit_s)
        chunks = self._prompts.take(budget, None if time_budget is None else time_budget.take)
        if time_budget is not None:
            self._budget.on_decode_step(self._clock.now, bool(chunks.tokens))
        self._works.append(StepWork(batch, context, chunks.tokens, chunks.pairs))
        self._ahead.on_planned(self._works[-1])
        return chunks

    def _limit_s(self, budget: int) -> float | None:
        """Return the time limit of the next step: None: no limit; infinite: a step without decode rows."""
        if not self._interval_s:
            return None
        now, target_s = self._clock.now, self._interval_s / MIXED_PACE
        slacks = (
            slack_s(now, request.first_token_time or now, request.output_tokens - 1, left, target_s, self._interval_s)
            for request, left in self.running.items()
        )
        full_step_s = self._ahead.predictor.estimate_s(StepWork(0, 0, budget, budget**2 / 2))
        waits_for_more = self._prompts.num_unplanned_tokens >= budget
        return self._budget.limit_s(now, self._interval_s, min(slacks, default=math.inf), full_step_s, waits_for_more)

    @property
    def _context(self) -> int:
        return sum(request.prompt_tokens + request.output_tokens - left for request, left in self.running.items())

    def start(self) -> None:
        """Begin the next step, as planned or with the work that is there now."""
        chunks, self._ahead.chunks = self._ahead.chunks, None
        if chunks is not None and not (chunks.tokens or self.running):
            self._ahead.on_ended(self._clock.now, 0.0)
            self._works.popleft()
            chunks = None
        self._chunks = chunks = chunks or self._take()
        batch = len(self.running) if self._works[0].decode_rows else 0
        work = StepWork(batch, self._context if batch else 0, chunks.tokens, chunks.pairs)
        self.step = Progress(self._clock, self._steps.seconds(work), self._on_done)

    def _on_done(self) -> None:
        assert self.step is not None
        assert self._chunks is not None
        seconds, chunks, work = self.step.total_s, self._chunks, self._works.popleft()
        batch = len(self.running) if work.decode_rows else 0
        self._ahead.on_ended(self.step.started, seconds)
        self.step = None
        self._on_stepped(chunks, batch, seconds)
        for request in list(self.running) if batch else ():
            self.running[request] -= 1
            if not self.running[request]:
                del self.running[request]
                self._on_finished(request)
        for request in self._prompts.on_computed(chunks, work, seconds):
            if self._on_computed(request):
                self.running[request] = request.output_tokens - 1
        self._pump()

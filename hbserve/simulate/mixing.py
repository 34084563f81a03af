"""A worker that mixes prompt chunks into its decode steps, on the simulated clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from hbserve.config.semi_pd import MIXED_PACE
from hbserve.policy.mixed_step_budget import MixedStepBudget, StepTimeBudget, slack_s
from hbserve.policy.step_time_predictor import StepWork
from hbserve.simulate.clock import Progress, SimulatedClock
from hbserve.simulate.phases import Chunks, PlanAhead, Prompts, Sizes
from hbserve.simulate.requests import SimulatedRequest
from hbserve.slo.step_times import StepTimes


class MixedPhase:
    """Computes prompts and decodes, by the scheduler's rules for such a worker.

    Args:
        prompts: to compute.
        interval_s: from one decode step to the next, mean, that TPOT's target allows; 0: steps take as long as they
            take.
        stepped: called after a step with its prompts, its decode rows, and seconds.
        computed: called with each request whose prompt is complete; returns whether it goes on to decode.
        finished: called with each request that has all its tokens.
        pump: called after each step, to start the next one.

    Attributes:
        running: sequences that decode, with the tokens still to come.
        step: under way.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimes,
        sizes: Sizes,
        prompts: Prompts,
        interval_s: float,
        stepped: Callable[[Chunks, int, float], None],
        computed: Callable[[SimulatedRequest], bool],
        finished: Callable[[SimulatedRequest], None],
        pump: Callable[[], None],
    ) -> None:
        self._clock, self._steps, self._sizes, self._prompts = clock, steps, sizes, prompts
        self._stepped, self._computed, self._finished, self._pump = stepped, computed, finished, pump
        self._interval_s, self._pace = interval_s, MixedStepBudget()
        self._ahead = PlanAhead(clock, pump)
        self._decodes: deque[bool] = deque()  # whether there are decode rows in the steps planned or under way
        self._chunks: Chunks | None = None
        self.running: dict[SimulatedRequest, int] = {}
        self.step: Progress | None = None

    @property
    def has_planned(self) -> bool:
        """Whether the step after the one under way is on its way already."""
        return self._ahead.chunks is not None

    def plan_ahead(self) -> None:
        """Shortly before a step ends the next is planned: what comes later waits for both."""
        if self.step is not None and (self.running or self._prompts.has_more) and self._ahead.is_due():
            self._ahead.chunks = self._take()

    def _take(self) -> Chunks:
        budget = min(self._sizes.max_num_batched_tokens - len(self.running), self._sizes.max_chunk_prefill_tokens)
        limit_s, room = self._limit_s(budget), None
        batch, context = (0, 0) if limit_s == math.inf else (len(self.running), self._context)
        if batch and limit_s is not None:
            room = StepTimeBudget(self._ahead.predictor, StepWork(batch, context, 0, 0.0), limit_s)
        chunks = self._prompts.take(budget, None if room is None else room.take)
        if room is not None:
            self._pace.on_decode_step(self._clock.now, bool(chunks.tokens))
        self._ahead.planned(StepWork(batch, context, chunks.tokens, chunks.keys))
        self._decodes.append(bool(batch))
        return chunks

    def _limit_s(self, budget: int) -> float | None:
        if not self._interval_s:
            return None
        now, target_s = self._clock.now, self._interval_s / MIXED_PACE
        spares = (
            slack_s(now, each.first_token_time or now, each.output_tokens - 1, left, target_s, self._interval_s)
            for each, left in self.running.items()
        )
        full_step_s = self._ahead.predictor.estimate_s(StepWork(0, 0, budget, budget**2 / 2))
        waits_for_more = self._prompts.num_unplanned_tokens >= budget
        return self._pace.limit_s(now, self._interval_s, min(spares, default=math.inf), full_step_s, waits_for_more)

    @property
    def _context(self) -> int:
        return sum(each.prompt_tokens + each.output_tokens - left for each, left in self.running.items())

    def start(self) -> None:
        """Begin the next step, as it was planned or with what is there now."""
        chunks, self._ahead.chunks = self._ahead.chunks, None
        if chunks is not None and not (chunks.tokens or self.running):
            self._ahead.ended(self._clock.now, 0.0)
            self._decodes.popleft()
            chunks = None
        self._chunks = chunks = chunks or self._take()
        batch = len(self.running) if self._decodes[0] else 0
        prompt_context = chunks.context if chunks.tokens else 0.0
        milliseconds = self._steps.mixed_ms(
            chunks.tokens, batch, self._context / batch if batch else 0.0, prompt_context
        )
        self.step = Progress(self._clock, milliseconds / 1000, self._done)

    def _done(self) -> None:
        assert self.step is not None
        assert self._chunks is not None
        seconds, chunks = self.step.total_s, self._chunks
        batch = len(self.running) if self._decodes.popleft() else 0
        self._ahead.ended(self.step.started, seconds)
        self.step = None
        self._stepped(chunks, batch, seconds)
        for request in list(self.running) if batch else ():
            self.running[request] -= 1
            if not self.running[request]:
                del self.running[request]
                self._finished(request)
        for request in self._prompts.done(chunks, seconds):
            if self._computed(request):
                self.running[request] = request.output_tokens - 1
        self._pump()

"""A prefill worker and a decode worker, step by step, on the simulated clock.

The rules are the scheduler's (`hbserve.scheduler.step_planner`): prompts in its policy's order, each with
one chunk per step up to the step's budget; all decoding sequences in every decode step. Decode steps of
an unchanged batch are one event.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from hbserve.config import SchedulerConfig
from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.mixed_step_budget import slack_s
from hbserve.policy.prefill_rate import PrefillRate
from hbserve.policy.queue_policy import QueuePolicy, make_policy
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.simulate.clock import Event, Progress, SimulatedClock
from hbserve.simulate.requests import SimulatedRequest
from hbserve.slo.step_times import StepTimes

_FCFS = SchedulerConfig()
_LONGEST_BURST = 64  # decode steps in one event: the context grows meanwhile
PLANS_WAY_S = 2e-3  # from a decision to a step that is ready on the device
_ROUND_TRIP_S = 1e-3  # of a result and the next plan, where that is a small one


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Limits of one instance; defaults are the engine's, and what an 8B model leaves of an H200 for KV.

    Attributes:
        kv_tokens: that its KV pool holds.
        scheduler: the order of its queue.
    """

    chunk_size: int = 512
    max_chunk_prefill_tokens: int = 4096
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    kv_tokens: int = 800_000
    scheduler: SchedulerConfig = _FCFS


@dataclass(frozen=True)
class Chunks:
    """The prompt part of a step.

    Attributes:
        keys: query-key pairs, half of them for the tokens among themselves.
    """

    parts: tuple[tuple[SimulatedRequest, int], ...]
    tokens: int
    keys: float

    @property
    def context(self) -> float:
        """Of one prompt of as many tokens that costs the same."""
        return self.keys / self.tokens - self.tokens / 2


class Prompts:
    """Those that have an allocation and are not computed, in the order of the scheduler's policy.

    Args:
        sizes: how much of one, and of all, goes into a step.
    """

    def __init__(self, clock: SimulatedClock, sizes: Sizes) -> None:
        self._clock, self._sizes = clock, sizes
        self._pace = PrefillRate()
        self.policy = make_policy(sizes.scheduler, self._pace.prompt_s, lambda: self._pace.step_s)
        self._is_fifo = type(self.policy) is QueuePolicy
        self.requests: list[SimulatedRequest] = []

    def __bool__(self) -> bool:
        return bool(self.requests)

    @property
    def has_more(self) -> bool:
        """Whether there are prompts whose last chunk is not planned."""
        return any(request.planned_tokens < request.prompt_tokens for request in self.requests)

    @property
    def num_unplanned_tokens(self) -> int:
        """Not yet in a step under way or planned."""
        return sum(request.prompt_tokens - request.planned_tokens for request in self.requests)

    @property
    def backlog_tokens(self) -> int:
        """Not yet computed."""
        return sum(request.prompt_tokens - request.computed_tokens for request in self.requests)

    def has_enough(self, request: SimulatedRequest) -> bool:
        """Whether the next step is full, and the request would not be computed before one that is here."""
        tokens, key = 0, self._key(request)
        for other in self.requests:
            if not self._is_fifo and other.planned_tokens < other.prompt_tokens and self._key(other) > key:
                return False
            tokens += min(other.prompt_tokens - other.planned_tokens, self._sizes.chunk_size)
        return tokens >= self._sizes.max_chunk_prefill_tokens

    def take(self, budget: int, fit: Callable[[int, int], int] | None = None) -> Chunks:
        """What the next step to be planned computes.

        Args:
            fit: how many of a prompt's next tokens there is time for, of at most so many after so many others.
        """
        parts, tokens, keys = [], 0, 0.0
        ordered = self.requests if self._is_fifo else sorted(self.requests, key=self._key)
        for request in ordered:
            start = request.planned_tokens
            chunk = wanted = min(request.prompt_tokens - start, self._sizes.chunk_size, budget - tokens)
            if chunk > 0 and fit is not None:
                chunk = fit(chunk, start)
            if chunk > 0:
                parts.append((request, chunk))
                request.planned_tokens += chunk
                tokens += chunk
                keys += chunk * (start + chunk / 2)
            if tokens >= budget or chunk < wanted:
                break
        return Chunks(tuple(parts), tokens, keys)

    def done(self, chunks: Chunks, seconds: float) -> list[SimulatedRequest]:
        """A step has computed these; returns those that are complete, which leave."""
        if chunks.tokens:
            self._pace.observe(chunks.tokens, seconds, chunks.keys)
        complete = []
        for request, tokens in chunks.parts:
            request.computed_tokens += tokens
            if request.computed_tokens == request.prompt_tokens:
                self.requests.remove(request)
                complete.append(request)
        return complete

    def _key(self, request: SimulatedRequest) -> tuple[bool, tuple[int, float, float]]:
        return self.policy.key(request, request.planned_tokens, self._clock.now)


class PlanAhead:
    """The next step, decided while one is under way: as late as the scheduler does, which times plans by the same rule.

    Args:
        pump: called when it is time to decide.

    Attributes:
        chunks: its prompts; None: it is not decided.
    """

    def __init__(self, clock: SimulatedClock, pump: Callable[[], None]) -> None:
        self._clock, self._pump = clock, pump
        self._timing = DispatchTimer()
        self._planned_at: deque[float] = deque()
        self._alarm: Event | None = None
        self.chunks: Chunks | None = None

    @property
    def predictor(self) -> StepTimePredictor:
        """Of steps, from those that have been seen."""
        return self._timing.predictor

    def is_due(self) -> bool:
        """Whether to decide now; if not, `pump` is called later."""
        if self.chunks is not None:
            return False
        if self._alarm is not None:
            self._alarm.cancel()
        wait_s = self._timing.wait_s(self._clock.now)
        if wait_s > 0:
            self._alarm = self._clock.at(self._clock.now + wait_s, self._pump)
        return not wait_s

    def planned(self, work: StepWork) -> None:
        """A step has been decided, for now or for later."""
        self._timing.on_planned(work, self._clock.now)
        self._planned_at.append(self._clock.now)

    def ended(self, began: float, seconds: float) -> None:
        """The oldest step has ended; seconds: 0 if there was nothing to do in it."""
        self._timing.on_confirmed(self._clock.now, seconds, began - self._planned_at.popleft() - PLANS_WAY_S)


class PrefillPhase:
    """Computes prompts.

    Args:
        computed: called with each request whose prompt is complete.
        idle: called after each step, to start the next one.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimes,
        sizes: Sizes,
        computed: Callable[[SimulatedRequest], None],
        idle: Callable[[], None],
    ) -> None:
        self._clock, self._steps, self._sizes = clock, steps, sizes
        self._computed, self._idle = computed, idle
        self.prompts = Prompts(clock, sizes)
        self.percentage = 100
        self.step: Progress | None = None
        self.chunks: Chunks | None = None
        self._plans: dict[int, PlanAhead] = {}  # of the worker at each percentage
        self._last_end = float("-inf")
        self.busy_s = 0.0
        self.last_busy_s = 0.0

    def start(self, percentage: int) -> None:
        """Begin a step on so much of the device; one that is planned already is at the worker of the step before."""
        changes = self.percentage != percentage and self._last_end == self._clock.now
        self.percentage = percentage
        self.chunks = chunks = self._ahead.chunks or self._take()
        self._ahead.chunks = None
        seconds = self._steps.prefill_ms(chunks.tokens, chunks.context, percentage) / 1000
        # Another worker can begin only when the one before has ended, and its plan is on the way then.
        self.step = Progress(self._clock, seconds + changes * PLANS_WAY_S, self._done)

    @property
    def _ahead(self) -> PlanAhead:
        """Each worker's steps are timed by themselves."""
        return self._plans.setdefault(self.percentage, PlanAhead(self._clock, self._idle))

    @property
    def has_planned(self) -> bool:
        """Whether the next step is with the worker already."""
        return self._ahead.chunks is not None

    def plan_ahead(self, percentage: int) -> None:
        """Shortly before a step ends the next is planned: what comes later waits for both.

        Args:
            percentage: that the next step is to have; another worker's is not planned before this one's are done.
        """
        if self.step is not None and percentage == self.percentage and self.prompts.has_more and self._ahead.is_due():
            self._ahead.chunks = self._take()

    def _take(self) -> Chunks:
        chunks = self.prompts.take(self._sizes.max_chunk_prefill_tokens)
        self._ahead.planned(StepWork(0, 0, chunks.tokens, chunks.keys))
        return chunks

    def _done(self) -> None:
        assert self.step is not None
        assert self.chunks is not None
        self.last_busy_s = self._clock.now - self.step.started
        self.busy_s += self.last_busy_s
        self._last_end = self._clock.now
        self._ahead.ended(self.step.started, self.last_busy_s)
        self.step, chunks = None, self.chunks
        for request in self.prompts.done(chunks, self.last_busy_s):
            self._computed(request)
        self._idle()


class DecodePhase:
    """Decodes all its sequences in lockstep.

    Args:
        stepped: called after a run of equal steps with their number, the sequences and the seconds.
        finished: called with each request that has all its tokens.
        idle: called after that, to start the next steps.

    Attributes:
        alone_ms: that a step of the last run takes if nothing runs beside.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimes,
        stepped: Callable[[int, int, float], None],
        finished: Callable[[SimulatedRequest], None],
        idle: Callable[[], None],
    ) -> None:
        self._clock, self._steps = clock, steps
        self._stepped, self._finished, self._idle = stepped, finished, idle
        self.percentage = 100
        self.burst: Progress | None = None
        self.busy_s = 0.0
        self._last_end = float("-inf")
        self._step_s = self.alone_ms = 0.0
        self._num_steps = 0
        self._by_end: list[tuple[int, int, SimulatedRequest]] = []
        self._count = 0
        self._context = 0  # summed over the running sequences
        self._joining: list[tuple[SimulatedRequest, int]] = []

    @property
    def num_sequences(self) -> int:
        """Running, and about to."""
        return len(self._by_end) + len(self._joining)

    def min_spare_s(self, target_s: float, interval_s: float) -> float:
        """Of its sequences; see `hbserve.policy.mixed_step_budget.slack_s`."""
        now, ends = self._clock.now, [(request, end - self._num_steps) for end, _, request in self._by_end]
        spares = (
            slack_s(now, request.first_token_time or now, request.output_tokens - 1, left, target_s, interval_s)
            for request, left in [*ends, *self._joining]
        )
        return min(spares, default=math.inf)

    def join(self, request: SimulatedRequest, left: int) -> None:
        """A sequence whose prompt is computed takes part from the next step, for so many."""
        self._joining.append((request, left))
        self.end_burst_at_step()

    def leave(self) -> dict[SimulatedRequest, int]:
        """All sequences go elsewhere; with the steps that each still needs. Between two runs of steps."""
        assert self.burst is None
        left = {request: end - self._num_steps for end, _, request in sorted(self._by_end)} | dict(self._joining)
        self._by_end.clear()
        self._joining.clear()
        self._context = 0
        return left

    def end_burst_at_step(self) -> None:
        """Something has changed: plan anew when the current step ends."""
        if self.burst is not None:
            done = int(self.burst.done_s / self._step_s + 1e-9)
            self.burst.shorten(min(self.burst.total_s, (done + 1) * self._step_s))

    def start(self, percentage: int, max_steps: int = _LONGEST_BURST, waits: bool = False) -> None:
        """Begin a run of steps, at most so many, on so much of the device.

        Args:
            waits: it could be planned only when the step before had ended.
        """
        # So it is with the plan for another worker.
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
        self.alone_ms = self._steps.decode_ms(batch, self._context / batch + steps / 2, percentage)
        self._step_s = self.alone_ms / 1000
        if is_late:
            self._step_s += _ROUND_TRIP_S / steps
        self.burst = Progress(self._clock, steps * self._step_s, self._done)

    def _done(self) -> None:
        assert self.burst is not None
        steps, batch = round(self.burst.total_s / self._step_s), len(self._by_end)
        seconds = self._clock.now - self.burst.started
        self.burst = None
        self._last_end = self._clock.now
        self.busy_s += seconds
        self._num_steps += steps
        self._context += steps * batch
        self._stepped(steps, batch, seconds)
        while self._by_end and self._by_end[0][0] <= self._num_steps:
            request = heapq.heappop(self._by_end)[2]
            self._context -= request.prompt_tokens + request.output_tokens
            self._finished(request)
        self._idle()


class PrefixCache:
    """Which blocks of earlier prompts are still there: the least recently used go first."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._tokens = 0

    def match(self, request: SimulatedRequest) -> int:
        """Leading prompt tokens that are there; at least one is left to compute."""
        blocks = 0
        for name in request.prefix_blocks:
            if name not in self._blocks:
                break
            self._blocks.move_to_end(name)
            blocks += 1
        return min(blocks * request.block_tokens, request.prompt_tokens - 1)

    def insert(self, request: SimulatedRequest) -> None:
        """Its prompt has been computed."""
        for name in request.prefix_blocks:
            if name not in self._blocks:
                self._tokens += request.block_tokens
            self._blocks[name] = request.block_tokens
            self._blocks.move_to_end(name)
        while self._tokens > self._capacity_tokens:
            self._tokens -= self._blocks.popitem(last=False)[1]

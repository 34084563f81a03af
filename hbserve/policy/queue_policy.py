"""The order of prompts: of the waiting queue, and of the prompts that have a KV allocation.

Runs in the scheduler's process, and on the simulator's clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sized
from collections.abc import Sequence as Items
from typing import Protocol, TypeVar

from hbserve.config import SchedulerConfig
from hbserve.policy.step_time_predictor import StepTimePredictor

_RESUMED, _NEW = 0, 1
SAFETY_FACTOR = 1.05
"""Factor on predicted durations. Under overload each request is served at the last moment, so errors cost deadlines."""
_STEPS_WAITED = 0.5
"""Mean share of the step under way that a prompt waits for."""
_HORIZON = 256
"""Number of prompts at the head of a long queue that are looked at; the others are far from being served."""
_DEFAULT_TTFT_MS = 10_000.0
"""TTFT target of a request that has none; used for the order only."""


class Prompt(Protocol):
    """A request as a policy sees it; see `hbserve.scheduler.sequence.Sequence`."""

    rank: tuple[int, float, float]

    @property
    def tokens(self) -> Sized:
        """Tokens to compute."""

    @property
    def arrival(self) -> float:
        """Serial number, growing with every request."""

    @property
    def arrival_time(self) -> float:
        """Seconds."""

    @property
    def first_token_time(self) -> float | None:
        """Time of the first token that its client got, if it got one."""

    @property
    def ttft_target_ms(self) -> float | None:
        """TTFT target of the request, if it came with one."""


_Prompt = TypeVar("_Prompt", bound=Prompt)
Admitted = Callable[[], tuple[Items[tuple[Prompt, int]], int]]
"""Returns the prompts, with the number of their tokens computed or planned, and the number of workers for them."""


class QueuePolicy:
    """First come, first served.

    A request's rank is fixed when it begins to wait, so that a sorted queue stays sorted. Preempted requests whose
    client has tokens already go first.
    """

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        """Compute the rank of a sequence that begins to wait now; the smallest goes first."""
        return _NEW, sequence.arrival_time, sequence.arrival

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        """Put a queue that is sorted by rank in the order of admission.

        Args:
            admitted: says which prompts have an allocation and are not yet computed.
        """
        return waiting

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[bool, tuple[int, float, float]]:
        """Compute the sort key of a prompt that could be computed now; the smallest goes first.

        Args:
            num_computed: tokens of it that are computed already.
        """
        return False, sequence.rank

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        """Whether a sequence has missed its target, so that others do not wait for it."""
        return False


class ShortestPromptFirst(QueuePolicy):
    """Fewest tokens first; each second of waiting counts as ``ageing_tokens_per_s`` tokens less.

    All prompts age alike, so the time of arrival stands for the age, and ranks do not change.
    """

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing = ageing_tokens_per_s

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        length = len(sequence.tokens) + self._ageing * sequence.arrival_time
        return _group(sequence), length, sequence.arrival


class SloAware(QueuePolicy):
    """Earliest TTFT deadline first, without the prompts that would make others late: as many as possible in time.

    This is the rule of Moore and Hodgson (Moore, Management Science 15, 1968), which keeps the most deadlines on one
    machine. It goes through the prompts by deadline, admitted ones included. Whenever a deadline could not be kept, it
    defers the prompt with the most left to compute so far. Deferred prompts are computed when the others leave time.
    Least laxity alone would serve, under overload, the prompts that are about to be late, until all of them are.

    Args:
        predictor: of steps with prompts, at all workers that take prompts from this queue.
        default_ttft_ms: target of requests that come without one.
    """

    def __init__(self, predictor: StepTimePredictor, default_ttft_ms: float | None) -> None:
        self._predictor = predictor
        self._default_ttft_ms = default_ttft_ms or _DEFAULT_TTFT_MS
        self._deferred: set[Prompt] = set()  # admitted ones included

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        target_ms = sequence.ttft_target_ms or self._default_ttft_ms
        return _group(sequence), sequence.arrival_time + target_ms / 1000, sequence.arrival

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        allocations, num_workers = admitted()
        prompts: list[tuple[Prompt, int]] = [*allocations, *((sequence, 0) for sequence in waiting[:_HORIZON])]
        self._deferred = deferred = self._defer(prompts, now, num_workers) if len(prompts) > 1 else set()
        if deferred.isdisjoint(waiting):
            return waiting
        return [*(s for s in waiting if s not in deferred), *(s for s in waiting if s in deferred)]

    def _defer(self, prompts: list[tuple[Prompt, int]], now: float, num_workers: int) -> set[Prompt]:
        end = now + _STEPS_WAITED * self._predictor.step_s
        chosen: list[tuple[float, float, Prompt]] = []  # a heap, most to compute first: (-seconds, arrival, prompt)
        deferred = set()
        for sequence, num_computed in sorted(prompts, key=lambda item: item[0].rank):
            seconds = self._left_s(sequence, num_computed)
            end += seconds / num_workers
            group, deadline, arrival = sequence.rank
            if group == _NEW:
                heapq.heappush(chosen, (-seconds, -arrival, sequence))
                if end > deadline:
                    seconds, _, longest = heapq.heappop(chosen)
                    deferred.add(longest)
                    end += seconds / num_workers
        return deferred

    def _left_s(self, sequence: Prompt, num_computed: int) -> float:
        return SAFETY_FACTOR * self._predictor.prompt_s(max(0, len(sequence.tokens) - num_computed), num_computed)

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[bool, tuple[int, float, float]]:
        """See `QueuePolicy.key`. Prompts that can be in time go before late and deferred ones."""
        group, deadline, _ = sequence.rank
        if sequence in self._deferred:
            return True, sequence.rank
        seconds = self._left_s(sequence, num_computed) + _STEPS_WAITED * self._predictor.step_s
        return group == _NEW and now + seconds > deadline, sequence.rank

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        group, deadline, _ = sequence.rank
        return group == _NEW and now > deadline


def make_policy(config: SchedulerConfig, predictor: StepTimePredictor) -> QueuePolicy:
    """Make the configured policy; ``predictor`` is that of `SloAware`."""
    if config.policy == "shortest_prompt_first":
        return ShortestPromptFirst(config.ageing_tokens_per_s)
    if config.policy == "slo_aware":
        return SloAware(predictor, config.ttft_ms)
    return QueuePolicy()


def _group(sequence: Prompt) -> int:
    return _NEW if sequence.first_token_time is None else _RESUMED

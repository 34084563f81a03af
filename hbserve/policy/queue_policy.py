"""Which prompt is computed next: the order of the waiting queue and of the prompts that have an allocation."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sized
from collections.abc import Sequence as Items
from typing import Protocol, TypeVar

from hbserve.config import SchedulerConfig

_RESUMED, _NEW = 0, 1
SAFETY_FACTOR = 1.05
"""Times that what is predicted may take: under overload whoever is served is served at the last moment."""
_STEPS_WAITED = 0.5
"""Of the step under way, that a prompt waits for, mean."""
_HORIZON = 256
"""So many of a long queue are looked at; what comes after them is far from being served."""
_DEFAULT_TTFT_MS = 10_000.0
"""TTFT target, for the order only, of a request that has none."""


class Prompt(Protocol):
    """What a policy looks at; see `hbserve.scheduler.sequence.Sequence`."""

    rank: tuple[int, float, float]

    @property
    def tokens(self) -> Sized:
        """To be computed."""

    @property
    def arrival(self) -> float:
        """Grows with every request."""

    @property
    def arrival_time(self) -> float:
        """Seconds."""

    @property
    def first_token_time(self) -> float | None:
        """Set where its client has tokens."""

    @property
    def ttft_target_ms(self) -> float | None:
        """That it came with."""


_Prompt = TypeVar("_Prompt", bound=Prompt)
Admitted = Callable[[], tuple[Items[tuple[Prompt, int]], int]]
"""Prompts, with how many of their tokens are computed or will be next; and the number of workers that do it."""


class QueuePolicy:
    """First come, first served.

    A request's rank is fixed when it begins to wait, so that a sorted queue stays sorted. Those whose
    client has tokens already, and which were put back, go before all others.
    """

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        """Smaller goes first. Of a sequence that begins to wait now."""
        return _NEW, 0.0, sequence.arrival

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        """Whom to admit first, of a queue sorted by rank.

        Args:
            admitted: prompts that have an allocation and are not computed.
        """
        return waiting

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[bool, tuple[int, float, float]]:
        """Of those whose prompt could be gone on with now, the one with the smallest is.

        Args:
            num_computed: tokens that need not be computed any more.
        """
        return False, sequence.rank

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        """Whether a sequence has missed its target, and others do not wait for it."""
        return False


class ShortestPromptFirst(QueuePolicy):
    """Fewest tokens first; every second of waiting makes a prompt seem so many tokens shorter.

    All age alike, so the time of arrival stands for the age, and ranks do not change.
    """

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing = ageing_tokens_per_s

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        """See `QueuePolicy.rank`."""
        length = len(sequence.tokens) + self._ageing * sequence.arrival_time
        return _group(sequence), length, sequence.arrival


class SloAware(QueuePolicy):
    """As many as possible in time: earliest TTFT deadline first, without those that would make others late.

    Moore and Hodgson's rule (Moore, Management Science 15, 1968), which keeps the most deadlines on one
    machine: go through the prompts by deadline, admitted ones as well, and whenever one could not be kept, defer
    the one with the most left to compute so far. What is deferred, the hopeless among it, is served when the others
    leave time. Least laxity alone serves, under overload, whoever is about to be late, until all are.

    Args:
        prefill_s: predicted seconds to compute so many prompt tokens after so many others.
        step_s: that a step with prompts takes of late.
        default_ttft_ms: target of requests that come without one.
    """

    def __init__(
        self, prefill_s: Callable[[int, int], float], step_s: Callable[[], float], default_ttft_ms: float | None
    ) -> None:
        self._prefill_s, self._step_s = prefill_s, step_s
        self._default_ttft_ms = default_ttft_ms or _DEFAULT_TTFT_MS
        self._deferred: set[Prompt] = set()  # of those with an allocation

    def rank(self, sequence: Prompt) -> tuple[int, float, float]:
        """See `QueuePolicy.rank`."""
        target_ms = sequence.ttft_target_ms or self._default_ttft_ms
        return _group(sequence), sequence.arrival_time + target_ms / 1000, sequence.arrival

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        """See `QueuePolicy.order`."""
        allocations, num_workers = admitted()
        prompts: list[tuple[Prompt, int]] = [*allocations, *((sequence, 0) for sequence in waiting[:_HORIZON])]
        self._deferred = deferred = self._defer(prompts, now, num_workers) if len(prompts) > 1 else set()
        if deferred.isdisjoint(waiting):
            return waiting
        return [*(s for s in waiting if s not in deferred), *(s for s in waiting if s in deferred)]

    def _defer(self, prompts: list[tuple[Prompt, int]], now: float, num_workers: int) -> set[Prompt]:
        end = now + _STEPS_WAITED * self._step_s()
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
        return SAFETY_FACTOR * self._prefill_s(max(0, len(sequence.tokens) - num_computed), num_computed)

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[bool, tuple[int, float, float]]:
        """See `QueuePolicy.key`. Those that can be in time go before those that cannot, or that gave way to others."""
        group, deadline, _ = sequence.rank
        if sequence in self._deferred:
            return True, sequence.rank
        seconds = self._left_s(sequence, num_computed) + _STEPS_WAITED * self._step_s()
        return group == _NEW and now + seconds > deadline, sequence.rank

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        """See `QueuePolicy.has_missed_target`."""
        group, deadline, _ = sequence.rank
        return group == _NEW and now > deadline


def make_policy(
    config: SchedulerConfig, prefill_s: Callable[[int, int], float], step_s: Callable[[], float]
) -> QueuePolicy:
    """The configured policy; for ``prefill_s`` and ``step_s`` see `SloAware`."""
    if config.policy == "shortest_prompt_first":
        return ShortestPromptFirst(config.ageing_tokens_per_s)
    if config.policy == "slo_aware":
        return SloAware(prefill_s, step_s, config.ttft_ms)
    return QueuePolicy()


def _group(sequence: Prompt) -> int:
    return _NEW if sequence.first_token_time is None else _RESUMED
